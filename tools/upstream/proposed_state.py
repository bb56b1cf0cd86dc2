"""The proposal of a protocol for an optimizer's sharded state."""

from __future__ import annotations

from tools.upstream.edits import Change, Edit, after, before, new_file, unit_test

__all__ = ["STATE"]

_LAYER_WISE = "megatron/core/optimizer/layer_wise_optimizer.py"
_OPTIMIZER = "megatron/core/optimizer/optimizer.py"

_ASK = """\
        if gives_sharded_state(self):
            return self.optimizer.sharded_state(
                model_sharded_state_dict, self._main_params(), is_loading
            )
"""
_GIVE = """\
        if gives_sharded_state(self):
            self.optimizer.load_sharded_state(state_dict, self._main_params())
            return
"""

STATE = Change(
    "Proposal: a protocol for an optimizer's sharded state",
    """\
The wrappers make the state of a checkpoint from state_dict(): by param ids,
each in a form of its own, for state of the parameter's shape. An optimizer
that knows its state better gives it itself: HasShardedState, which the
wrappers ask, and which the layer-wise optimizer leaves as it is. All others
are saved as ever.

See NVIDIA/Megatron-LM#2617, #2625, #3939 and #6270.""",
    fixes=("megatron.core.models.mimo.optimizer:_iter_optimizer_sub_dicts",),
    files={**new_file("sharded_state.py"), **unit_test("optimizer/test_has_sharded_state.py")},
    edits=(
        before(
            _OPTIMIZER,
            "    @abstractmethod\n    def load_state_dict(self, state_dict):\n",
            """\
    def _main_params(self) -> Dict[torch.nn.Parameter, torch.Tensor]:
        \"\"\"What the optimizer inside updates, by the model's parameters.\"\"\"
        return {param: param for param in self.get_parameters()}

""",
        ),
        before(
            _OPTIMIZER,
            """\
    def _get_model_and_main_params_data_float16(self):
        model_data = []
        main_data = []
        for model_group, main_group in zip(self.float16_groups, self.fp32_from_float16_groups):
""",
            """\
    def _main_params(self) -> Dict[torch.nn.Parameter, torch.Tensor]:
        copies = zip(chain(*self.float16_groups), chain(*self.fp32_from_float16_groups))
        return {**dict(copies), **{param: param for param in chain(*self.fp32_from_fp32_groups)}}

""",
        ),
        before(
            _OPTIMIZER,
            """\

        if is_loading:
            self.init_state_fn(self.optimizer, self.config)

        state_dict = self.state_dict()

""",
            """\

        if gives_sharded_state(self):
            return self.optimizer.sharded_state(
                model_sharded_state_dict, self._main_params(), is_loading
            )""",
        ),
        before(
            _OPTIMIZER,
            """\
        if is_loading:
            self.init_state_fn(self.optimizer, self.config)

        state_dict = self.state_dict()
        id_to""",
            _ASK,
        ),
        before(
            _OPTIMIZER,
            """\
        # Optimizer.
        optimizer_key = 'optimizer'
        if optimizer_key not in state_dict:
            optimizer_key = 'optimizer_state_dict'
""",
            _GIVE,
        ),
        before(_OPTIMIZER, "        if 'common_step' in state_dict['state']:\n", _GIVE),
        Edit(
            _OPTIMIZER,
            "from .optimizer_config import OptimizerConfig\n\nlogger",
            "from .optimizer_config import OptimizerConfig\nfrom .sharded_state import gives_sharded_state\n\nlogger",
        ),
        after(_LAYER_WISE, "    pad_to_divisor,\n)\n", "from .sharded_state import gives_sharded_state\n"),
        Edit(
            _LAYER_WISE,
            "    def load_state_dict(self, state_dict):\n        if len(self.chained_optimizers) == 1:\n",
            "    def load_state_dict(self, state_dict):\n"
            "        if all(map(gives_sharded_state, self.chained_optimizers)):\n"
            "            super().load_state_dict(state_dict)\n            return\n"
            "        if len(self.chained_optimizers) == 1:\n",
        ),
        Edit(
            _LAYER_WISE,
            "            model_sharded_state_dict, is_loading, **kwargs\n        )\n\n        # (E)GTP",
            "            model_sharded_state_dict, is_loading, **kwargs\n        )\n"
            "        if all(map(gives_sharded_state, self.chained_optimizers)):\n"
            "            return sharded_state_dict\n\n        # (E)GTP",
        ),
    ),
)
