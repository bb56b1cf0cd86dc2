"""Further cases of what other cases test already: ``make test-slow`` runs them, ``make test`` has to be quick.

Regular expressions that are searched in a test's name, from its file on.
"""

SLOW_CASES = (
    r"test_adam_baseline.py.*\[1\]",
    r"test_checkpoint_migration.py.*\[(to_layer_wise-plain_dp2|to_tp2-plain_tp2)\]",
    r"test_checkpoint_safety.py::test_saved_by_the_persistent_worker.*\[(plain|tensor_parallel)\]",
    r"test_adaptive.py::test_shards_get_the_update_of_the_whole\[2\]",
    r"test_checkpoints.py.*\[(dense_on_8_ranks|hybrid_bf16)",
    r"test_checkpoints.py.*\[latent_attention-(.*older|one)",
    r"test_context_parallel.py.*\[mamba-(cp4|cp2_pp2|cp2_dp2|cp2_layer_wise|cp2_dp2_layer_wise)\]",
    r"test_context_parallel.py.*\[(delta-(cp4|cp2_ep2)|attention-(cp4|cp2_pp2)|hybrid-cp2_layer_wise|False)\]",
    r"test_cpu_mamba.py::test_losses_do_not_depend_on_the_layout\[(tp2|dp2)\]",
    r"test_cpu_parallelism.py.*\[(dense-(tp2-sp|pp2|dp2)|moe-ep2-tp2-etp2-sp|mla-tp2-sp|hybrid-dp2-buffers)\]",
    r"test_cpu_parallelism.py::test_resume_equals_going_on\[(adam-tp2|muon-layer-wise|muon-layer-wise-legacy)\]",
    r"test_gdn_in_proj.py::test_losses_do_not_depend_on_the_layout\[(adam|per_head)\]",
    r"test_hybrid_example.py::test_demo",
    r"test_hybrid_example.py::test_losses_do_not_depend_on_tensor_parallelism",
    r"test_launcher.py::test_unedited_script_trains_and_resumes\[--(tensor|pipeline)",
    r"test_layer_wise_balance.py::test_owners_follow_the_function\[(dense|experts|tensor)\]",
    r"test_layer_wise_balance.py::test_older_assignment\[.*-dense\]",
    r"test_layer_wise_balance.py::test_training_equals_the_plain_run\[(buckets|four replicas|expert parallel|older)",
    r"test_layer_wise_balance.py::test_plans_of_published_models\[(llama3_8b|nemotron_h_8b|qwen3_30b_a3b)\]",
    r"test_layouts.py.*\[(pp2|dp2_layer_wise|moe_dp2_layer_wise|gated_delta_net_dp2_layer_wise)\]",
    r"test_patched_megatron.py::test_same_losses_as_through_the_hooks\[gated_delta_net\]",
    r"test_plan.py::test_published_models\[(llama3_8b|nemotron_h_8b|qwen3_30b_a3b)\]",
    r"test_plan.py::test_plan_is_what_ranks_do\[(?!tensor auto|layer-wise, experts).*-bf16\]",
    r"test_qk_clip.py::test_training_does_not_depend.*\[gqa-(tp2_sp|pp2|dp2|cp2|adam_tp2_dp2.*)\]",
    r"test_qk_clip.py::test_training_does_not_depend.*\[(gate-tp2|mla-dp2_layer_wise)\]",
    r"test_qk_clip.py::test_tensor_parallel_shards.*\[((mha|mla|gqa)-4|gqa-gate-2|gqa-bias-2|gqa-bias-4-(exact|q_only))",
    r"test_sizes.py::test_shards_get_the_update_of_the_whole\[2\]",
    r"test_variants.py::test_losses_do_not_depend.*\[(adamuon|adamuon_eo|namo|update_norm|polargrad)\]",
    r"test_variants.py::test_state_is_saved.*\[(adamuon_eo|namo)\]",
    r"test_triton_symmetric.py::test_every_size_and_tile\[dtype[12]\]",
)
