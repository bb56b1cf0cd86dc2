"""Everything that the doctor says of a run, in its words: severity, title, usual cause, what to do."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something odd.

    Attributes:
        name: in :data:`WORDS`.
        severity: one of :data:`SEVERITIES`.
        title: what it is.
        seen: with numbers and iterations.
        cause: the usual one; may be empty.
        action: what to do, with the flag; may be empty.
    """

    name: str
    severity: str
    title: str
    seen: str
    cause: str
    action: str


# NAME | severity | title; two more lines are its cause and what to do, "-" where there is nothing to say.
_TEXT = """
not finite | error | the loss is not finite from iteration {at} on
a rate that is too high, attention logits that grow, or a bad batch
load a checkpoint from before {at}, with a lower --lr; --muon-nonfinite stop names the weight; --qk-clip bounds logits
diverged | error | the loss has risen since iteration {at} and stays up
a rate that is too high for this stage, or logits or weights that grow
load a checkpoint from before {at} and lower --lr; --muon-log-interval 10 --log-max-attention-logit show what grows
risen | error | the loss is higher than it was at first
a rate that is far too high, or a warm-up that is too short
start again with a lower --lr or a longer --lr-warmup-iters
flat | warning | the loss does not fall
a rate that is too small, or data without anything to learn
compare --lr with a run that learns; see that the data are those that you mean
spikes | warning | {spikes} of the loss, the largest at iteration {at}
a bad batch, or an update that was too large for some weights
if they come more often: a lower --lr, or --qk-clip where logits grow with them
skipped | warning | {count} of {all} steps were skipped
an overflow in the backward pass or in the reduction of gradients
--muon-nonfinite stop names the weight; without --grad-reduce-in-bf16 gradients are reduced in float32
many skipped | error | {count} of {all} steps were skipped
an overflow in the backward pass or in the reduction of gradients
--muon-nonfinite stop names the weight; without --grad-reduce-in-bf16 gradients are reduced in float32
gradients grow | warning | the gradient norm grows
weights or logits that grow; often comes before a divergence
look at spectral_norm by class (--muon-log-interval 10); a higher --weight-decay or a lower --lr
clipped | note | gradients are clipped in nearly every step
a limit below the usual norm. Muon's updates do not depend on the norm, and Adam's hardly
no harm by itself; a higher --clip-grad catches outliers alone
jump | warning | {flag} jumps at iteration {at}
other flags after a resume, or a schedule with a step in it
if it is not meant: the flags of the first start, without --override-opt_param-scheduler
no evaluation | note | no evaluation is recorded
-
--eval-interval 100 --eval-iters 10
overfitting | warning | the validation loss has risen since iteration {at}
data that are repeated too often, if the training loss still falls; else a divergence
stop, or go on from the checkpoint of {at} with a lower --lr
alarm | error | alarm {name} since iteration {at}
{cause}
{text}
nonfinite matrices | error | momentum or updates have NaN or infinity since iteration {at}
gradients that were not finite, and were not skipped
load a checkpoint from before {at}; --muon-nonfinite skip or stop, not propagate
unlifted | warning | Newton-Schulz lifts fewer directions than it did
small singular values of the momentum are below what its steps can lift, or below rounding
--muon-param-rule 'GLOB=steps:auto' for these, or --muon-coefficient-type polar_express --muon-num-ns-steps 8
rank | warning | the momentum loses rank
few directions carry the gradient: late layers, a rate that is too high, too little data for an expert
look at directions not lifted: beyond {limit} they raise rank_collapse; larger batches, a lower --lr
defect | warning | results are less orthogonal than they were
small singular values of the momentum are below what the iteration's steps can lift, or below rounding
one more of --muon-num-ns-steps, or --muon-param-rule 'GLOB=steps:auto'; --muon-ns-dtype fp32 against rounding
logits | warning | attention logits grow
query and key weights grow without a bound under Muon; the softmax saturates, and the loss spikes later
--qk-clip --qk-clip-threshold 100, from a checkpoint before the loss suffers; --qk-layernorm in a new run
dead experts | warning | experts get no tokens since iteration {at}
the router sends everything to the others
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2, or --moe-router-enable-expert-bias
zero gradients | warning | gradients are all zeros since iteration {at}
weights that nothing in the model uses
see that a loss reaches them; freeze them (requires_grad=False) if that is meant
large updates | warning | updates are large against the weights
a rate that is too high, or weights that have shrunk
a lower --lr or --weight-decay; --muon-scale-mode moonlight has updates as large as Adam's
tiny updates | warning | weights hardly move
a rate of nearly zero
look at the schedule of --lr: --min-lr, --lr-decay-iters
back and forth | warning | updates go back and forth
a rate that is too high for these weights, or hardly any momentum
a lower --lr; --muon-momentum 0.95
weights grow | warning | weights grow
too little decay for this rate
a higher --weight-decay (0.1 is usual for Muon), or a lower --lr
at bound | warning | the momentum is below --muon-eps, so updates shrink, since iteration {at}
an --muon-eps above the norms of small gradients, as Megatron-Core's 1e-7, or gradients of zeros
--muon-eps 1e-36, the default
nothing measured | note | nothing of Muon was measured
-
--muon-log-interval 10 beside --muon-log-jsonl; --log-max-attention-logit for logits
unmeasured | warning | {classes} of Muon's weights were never measured
they never had a gradient, or belong to a model that was not watched
see that they are trained: what no loss reaches has no gradient
slower | warning | steps become slower
memory that is nearly full, a warm or shared machine, growing data
look at the clocks of the GPUs, at who else uses the machine, and at memory
slow lines | warning | {count} lines took more than twice the usual time
loading of data, saving in the foreground, or a rank that others wait for
--num-workers, --async-save; Megatron's --log-straggler names the rank
share | note | the optimizer takes {share:.0%} of a step
few tokens a step for this model, Newton-Schulz in float32, or the same on all data-parallel ranks
a larger --global-batch-size; --use-distributed-optimizer; --muon-ns-dtype bf16; `plan` says what it should cost
waiting | warning | ranks wait for owners in {share:.0%} of the optimizer's step
owners have unequal work, as where there are fewer large matrices than ranks
--muon-tp-mode auto: ranks then work for one another (not in blockwise); a smaller --muon-chunk-mb sends results earlier
uneven | warning | ranks have unequal work in the optimizer
few large matrices for many ranks, or pipeline stages of different size
--muon-tp-mode auto; `python -m megatron_muon plan` shows who has what
exchange | warning | the optimizer waits for matrices of other ranks in {share:.0%} of its step
links that are slow against the arithmetic
--muon-tp-mode auto (gram in float32); --muon-tp-wire-dtype bf16; --muon-blockwise-period 5, which is another optimizer
one chunk | warning | the optimizer waits for matrices of other ranks in {share:.0%} of its step
a step of a single chunk: no other chunk hides its exchange
a smaller --muon-chunk-mb, so that there are several; --muon-tp-mode auto
memory | warning | peak memory still grows in the second half
longer sequences or more tokens for an expert; else something is kept from step to step
a smaller --micro-batch-size or --muon-chunk-mb if it comes close to the limit
resumed | warning | resumed at iteration {at} with other settings
another command line, machine or environment
if it is not meant: resume from there with the settings of the first start
printed means | note | the second loss that Megatron prints after each start is a mean
it has the iterations since the start in it: not the loss of the run that went on, though the bits may be
compare the lines of --muon-log-jsonl, or the third printed line
ended | error | the run ended at iteration {at} of {all}
killed, out of time, or an error: its text (--log FILE) says which
start it again with --load; a smaller --save-interval loses less
left | note | the run left at iteration {at} of {all}, as it was told to
--exit-interval, --exit-duration-in-mins, or the signal of --exit-signal-handler
start it again with --load: it goes on from its last checkpoint
damage | warning | {lines} of the record could not be read
two runs that wrote to one file, or a disk that was full
a file of its own for each run; a resume refuses such a file: remove the lines
gaps | warning | {gaps} in the record
the disk was full for a while, or two runs wrote to one file
look for WARNING --muon-log-jsonl in its text
version | warning | {name} is not of a version that this package is tested with
-
install {wanted}
precision | note | numbers are rounded by choice, and losses are not finite
16 bits or fewer for what is summed over many steps or ranks
try once without these flags
errors | error | its text has {lines} of errors
-
read the text from the first of these on
warnings | warning | its text has {warnings}
-
-
checkpoint | error | the checkpoint cannot be resumed from as it is
a save that was interrupted, or a file that was lost
--ckpt-step with one that is whole: {whole}
other flags | warning | the checkpoint of iteration {at} was saved with other flags
-
`python -m megatron_muon ckpt inspect` says what its state was made by
beyond | warning | the checkpoint of iteration {at} is beyond the record
they are not of one run, or the record was not written to the end
-
"""


def _parse(text: str) -> dict[str, tuple[str, str, str, str]]:
    lines = text.strip().splitlines()
    rows = (lines[number : number + 3] for number in range(0, len(lines), 3))
    parsed = ([*map(str.strip, head.split("|")), cause, action] for head, cause, action in rows)
    return {name: (severity, title, cause, action) for name, severity, title, cause, action in parsed}


WORDS = _parse(_TEXT)
"""Name of a finding -> severity, title, cause, action, with places for numbers."""


def finding(name: str, seen: str, /, **numbers: object) -> Finding:
    """One of :data:`WORDS` with what was seen."""
    severity, *texts = WORDS[name]
    title, cause, action = ("" if each == "-" else each.format(**numbers) for each in texts)
    return Finding(name, severity, title, seen, cause, action)


def few(names: list[str], most: int = 3, count: int = 0) -> str:
    """The first of many, of which there are ``count`` if not all have names here."""
    more = max(count, len(names)) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def many(count: int, name: str, plural: str = "s") -> str:
    """A number of things."""
    return f"{count} {name}{'' if count == 1 else plural}"
