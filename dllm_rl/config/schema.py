"""The configuration of a run. One YAML file, validated before anything else happens.

Sections that name a plugin (task, strategy, algorithm, rewards) hold ``name`` and, beside it, the plugin's own
options; those are checked against the plugin's Config when it is built.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dllm_rl.config.cluster import ClusterSection, LearnerSection, RolloutSection, check
from dllm_rl.config.presets import with_preset
from dllm_rl.config.section import PathText, Plugin, Section
from dllm_rl.errors import UserError
from dllm_rl.literals import Confidence, Schedule


class RewardPlugin(Plugin):
    """A reward function with its weight and deadline."""

    weight: float = 1.0
    """Factor in the total reward."""
    timeout_s: float = Field(default=5.0, gt=0)
    """Seconds per completion, counted from the moment that a worker starts on it."""


class RunSection(Section):
    """What to call the run and how long it is."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    """Name of the run and of its folder below ``output``."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random draw."""
    steps: int = Field(ge=1)
    """Batches to train on; each makes learner.updates_per_step times learner.minibatches optimiser updates."""
    output: PathText = Field(default="runs", pattern=r"^[^\x00]+$")
    """Parent folder of run folders."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads for torch; null leaves torch's default."""
    log_samples: int = Field(default=4, ge=0)
    """Completions per step that are written to samples.jsonl."""


class InitSection(Section):
    """A model made from scratch instead of loaded."""

    hidden_size: int = Field(default=96, ge=8)
    """Width."""
    num_layers: int = Field(default=3, ge=1)
    """Transformer layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads; must divide hidden_size."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads; null = num_heads."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Width of the MLP; null = 8/3 of hidden_size, rounded up to a multiple of 8."""
    max_length: int = Field(default=256, ge=2)
    """Longest sequence, tokens."""
    tokenizer: Literal["characters", "byte_bpe"] = "characters"
    """"characters": one token per character of the task; "byte_bpe": trained on the task's training texts."""
    vocab_size: int = Field(default=512, ge=260)
    """Vocabulary of a byte_bpe tokenizer, special tokens included."""

    @model_validator(mode="after")
    def _heads(self) -> InitSection:
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size = {self.hidden_size} is not a multiple of num_heads = {self.num_heads}")
        return self


class LoraSection(Section):
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = Field(ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=64.0, gt=0)
    """Scale; the update is alpha / rank * B A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Module names in the family's own words; each must match at least one module. null = the family's default."""


class TeacherSection(Section):
    """Another network in the place of the reference policy, over the vocabulary of the model."""

    path: PathText = Field(min_length=1)
    """Local folder or hub name."""
    family: str | None = None
    """Model family, by entry point or "package.module:Name"; null = by config.json."""
    revision: str | None = None
    """Hub revision."""
    autoregressive: bool = False
    """A causal language model of transformers, scored from left to right on the tokens as they are in the end."""


class ModelSection(Section):
    """Which network."""

    path: PathText | None = None
    """Local folder or hub name; a run (its newest checkpoint), a checkpoint, or an adapter, whose base is found by its
    adapter_config.json and which is trained on. Exactly one of ``path`` and ``init``."""
    merge_adapter: bool = False
    """Add the adapter of ``path`` to its base first, into the run folder's ``initial``, and start from the sum."""
    init: InitSection | None = None
    """Make a small model from scratch."""
    family: str | None = None
    """Model family, by entry point or "package.module:Name"; null = by config.json. Needed with ``init``."""
    revision: str | None = None
    """Hub revision."""
    trust_remote_code: bool = False
    """Allow a tokenizer's own Python code; model code from the hub is never run."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Data type of the parameters."""
    device: str = "auto"
    """"auto" (cuda if present, else cpu), or a torch device."""
    block_size: int | None = Field(default=None, ge=1)
    """Block size of a block-causal family, if the checkpoint does not say."""
    block_origin: Literal["response", "sequence"] | None = None
    """Where blocks start in a block-causal family: at the response or at the sequence; null = as config.json says, else
    as in the family's published generator."""
    end_tokens: list[str | int] = Field(default=[])
    """Further tokens that end a completion, as text or id, such as ["<|im_end|>"]; beside the tokenizer's EOS token and
    the eos_token_id of config.json and generation_config.json."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass to save memory."""
    lora: LoraSection | None = None
    """Train adapters only."""
    teacher: TeacherSection | None = None
    """The reference of algorithms that read one is this network; null = the model at the start of the run."""
    quantize: Literal["nf4"] | None = None
    """Hold the frozen weights below an adapter in 4 bits (QLoRA; bitsandbytes, CUDA only)."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.init is None):
            raise UserError("give exactly one of model.path (load a checkpoint) and model.init (start from scratch)")
        if self.merge_adapter and self.path is None:
            raise UserError("model.merge_adapter: a model of model.init has no adapter; leave one of them out")
        if self.quantize is not None and self.lora is None:
            raise UserError(
                f"model.quantize = {self.quantize}: weights in 4 bits cannot be trained, only an adapter on top of "
                f"them; add model.lora: {{rank: 16}}"
            )
        return self


class DataSection(Section):
    """Which prompts, and how many."""

    task: Plugin
    """The task."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts (or supervised rows) per optimiser step."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Completions per prompt: the group."""
    resample_flat_groups: int = Field(default=0, ge=0)
    """Rounds in which groups that teach nothing (equal rewards, or none that is kept) are replaced by those of other
    prompts, as in DAPO; what is missing after them stays. 0 = none are replaced."""
    keep_accuracy: tuple[float, float] | None = None
    """Train on groups whose share of solved samples lies in this range, both ends included; null = on all."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are an error; null = what the model has room for."""
    system_prompt: str | None = None
    """Put before every chat prompt."""

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.keep_accuracy is not None and not 0 <= self.keep_accuracy[0] <= self.keep_accuracy[1] <= 1:
            raise UserError(f"keep_accuracy = {self.keep_accuracy}: need 0 <= low <= high <= 1")
        return self


class SamplingSection(Section):
    """How completions are decoded while training."""

    preset: Literal["llada", "dream", "sdar", "fast_dllm"] | None = None
    """Decode as the released generator of that name by default; keys beside it override single settings."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Length of the completion canvas, tokens."""
    block_size: int | None = Field(default=None, ge=1)
    """Decoding block; null = the whole canvas (block-causal families: their own block size)."""
    tokens_per_step: int = Field(default=1, ge=1)
    """Positions committed per forward by count-based strategies."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps of the whole canvas, instead of tokens_per_step."""
    schedule: Schedule = "static"
    """How many positions each step commits: static, uniform, timesteps or ancestral."""
    temperature: float = Field(default=1.0, ge=0)
    """0 = greedy."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep the k most likely tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Keep the smallest set of tokens with this probability."""
    top_p_first: bool = False
    """Apply top_p before top_k."""
    confidence: Confidence = "model"
    """Rank positions by the model's distribution, or by the tempered and filtered one that tokens are sampled from."""
    cfg_scale: float = Field(default=0.0, ge=0)
    """Classifier-free guidance, 0 = none; doubles the forwards. Full attention without shift only."""
    suppress_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids that are never generated."""
    defer_tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Token ids whose positions are committed last."""
    strategy: Plugin = Plugin(name="low_confidence")
    """Which positions to commit."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _one_speed(self) -> Self:
        if self.steps is not None and self.tokens_per_step != 1:
            raise UserError(
                f"steps = {self.steps} and tokens_per_step = {self.tokens_per_step} both say how many positions a "
                "forward commits; leave one of them out"
            )
        return self


class EngineSection(Plugin):
    """What generates rollouts; further keys are the engine's own options."""

    name: str = "native"
    """Entry-point name, or "package.module:Name"."""


class RewardsSection(Section):
    """How reward workers run."""

    workers: int = Field(default=2, ge=1)
    """Worker processes."""
    max_failure_fraction: float = Field(default=0.5, ge=0, le=1)
    """Stop the run if a larger share of a batch could not be scored."""
    truncated: Literal["score", "blank"] = "score"
    """What reward functions see, in training, of a completion that filled the canvas without an end token: its text, or
    an empty one, so that a right answer in it counts as wrong."""
    self_test: int = Field(default=8, ge=0)
    """Examples whose gold answer must score full, and a wrong one not, before training starts; 0 = no check."""


class EvaluateSection(Section):
    """Held-out evaluation."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate every so many steps; null = only at the start and the end."""
    limit: int | None = Field(default=256, ge=1)
    """Held-out examples, the first ones of a fixed shuffle; null = all."""
    temperature: float = Field(default=0.0, ge=0)
    """0 = greedy."""
    tokens_per_step: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    """Speeds to evaluate at; null = the training one."""
    strategy: Plugin | None = None
    """Which positions to commit; null = as in training."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""


class DiagnosticsSection(Section):
    """How noisy the likelihood estimates are, measured by drawing masks again for a few rows."""

    every_steps: int | None = Field(default=10, ge=1)
    """Measure every so many steps; null = never."""
    rows: int = Field(default=4, ge=1)
    """Rows of the batch that are scored again."""
    redraws: int = Field(default=4, ge=2)
    """Draws of all masks per row."""


class DriftSection(Section):
    """When to stop a run whose model becomes overconfident: its last steps against its first ones, both as means."""

    tokens_per_forward: float | None = Field(default=None, gt=0)
    """Largest multiple of the first steps' tokens per forward, such as 1.5; null = any."""
    confidence: float | None = Field(default=None, gt=0, lt=1)
    """Largest rise of the mean probability of generated tokens, such as 0.1; null = any."""
    reward_gain: float | None = 0.0
    """No stop while the reward is higher than in the first steps by more than this; null = whatever the reward."""
    window: int = Field(default=5, ge=1)
    """Steps that a mean is over; 1 = compare the newest step with the very first."""

    @property
    def limits(self) -> bool:
        """Whether any figure has a limit."""
        return self.tokens_per_forward is not None or self.confidence is not None


class TrackingSection(Section):
    """Where metrics go beside metrics.jsonl."""

    to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=[])
    """Experiment trackers; one that fails is left out and never stops the run."""
    project: str = "dllm-rl"
    """Project or experiment, for trackers that know such a thing."""


class CheckpointSection(Section):
    """When state is saved."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every so many steps; null = by the clock and at the end."""
    every_minutes: float | None = Field(default=15.0, gt=0)
    """Save after the step in which so many minutes have passed since the last time; null = never by the clock."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""


class Config(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    engine: EngineSection = EngineSection()
    algorithm: Plugin
    rewards: list[RewardPlugin] | None = None
    """Reward functions; null = the task's own."""
    reward_normalisation: Literal["total", "decoupled"] = "total"
    """What methods that compare the samples of a prompt normalise: the sum of the rewards, or each of them before they
    are added up (decoupled), so that none drowns the others."""
    reward_pool: RewardsSection = RewardsSection()
    learner: LearnerSection = LearnerSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    diagnostics: DiagnosticsSection = DiagnosticsSection()
    drift: DriftSection = DriftSection()
    tracking: TrackingSection = TrackingSection()
    rollout: RolloutSection = RolloutSection()
    cluster: ClusterSection = ClusterSection()
    provenance: dict[str, Any] | None = None
    """Versions and source revision, written by the run into its resolved configuration; ignored on input."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        check(self.cluster, self.rollout, self.learner, quantized=self.model.quantize is not None)
        canvas, speeds = self.sampling.max_new_tokens, self.evaluate.tokens_per_step or []
        for key, speed in (("sampling", self.sampling.tokens_per_step), *(("evaluate", speed) for speed in speeds)):
            if speed > canvas:
                raise UserError(
                    f"{key}.tokens_per_step = {speed}: a completion has sampling.max_new_tokens = {canvas} tokens; set "
                    f"at most {canvas}"
                )
        for speed in speeds:
            if speeds.count(speed) > 1:
                raise UserError(f"evaluate.tokens_per_step lists {speed} twice; leave one of them out")
        return self
