"""The whole configuration of a run: nested frozen dataclasses, nothing else.

What enters: one YAML file and `section.field=value` overrides (`load.py`). What leaves: a `Config` that
every part of the system reads and nobody changes; its resolved copy is saved with the run.

    model:    {size: opt-125m, initialisation: random}
    data:     {train_corpus: corpus/train, train_plan: plan/train}
    training: {steps: 4000, global_batch_positions: 524288}

The string under a field is its documentation. Names follow Megatron's vocabulary. No torch here: `--help`
must answer in well under a second.
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and regularisation of OPT."""

    size: str | None = None
    """A name of the OPT family, e.g. opt-125m: fills the shape fields below that are 0."""
    # 0 and not None for "as the size says": once loaded, every reader has an int and no case to tell apart.
    num_layers: int = 0
    """Decoder layers; 0 means as model.size says."""
    hidden_size: int = 0
    """Width of the residual stream; 0 means as model.size says."""
    num_attention_heads: int = 0
    """Attention heads; hidden_size / num_attention_heads is the head size; 0 means as model.size says."""
    # Filled by its own rule and not by the size: every published OPT has 4 x hidden_size.
    ffn_hidden_size: int = 0
    """Width of the feed-forward layer; 0 means 4 x hidden_size, as in every OPT."""
    max_position_embeddings: int = 2048
    """Longest document in positions; the table has two more rows, because OPT's first position is row 2."""
    vocab_size: int = 50272
    """Rows of the embedding: the tokenizer's entries rounded up to a multiple of 8 (50,265 -> 50,272)."""
    # Three, since OPT was pretrained without the third and tuned with it.
    hidden_dropout: float = 0.1
    """Dropout probability after the attention and feed-forward projections."""
    attention_dropout: float = 0.1
    """Dropout probability on attention probabilities."""
    embedding_dropout: float = 0.1
    """Dropout probability on the sum of word and position embeddings."""
    # metaseq's for OPT of every width; small models, which the size does not name, want more (demo: 0.02).
    init_method_std: float = 0.006
    """Standard deviation of a random start; output projections use std / sqrt(2 x num_layers)."""
    # No default start: random weights by oversight would show only in a loss curve, hours later.
    initialisation: Literal["random"] | None = None
    """`random` starts from random weights; otherwise checkpoint.initial_weights must name a start."""
    kernel_backend: Literal["triton", "reference"] = "triton"
    """Implementation of attention, norms and loss: Triton on GPUs, plain torch anywhere; never replaced
    silently."""
    attention_backend: Literal["triton", "reference", "flash"] | None = None
    """Another implementation of attention alone. flash: flash-attn's varlen functions, where installed;
    for training without attention dropout and on plans without shared prefixes."""
    # In this section, since it belongs to the weights: it is saved with them, and evaluation compares.
    inference_prefix: Literal["none", "eos"] = "none"
    """Token before a prompt in evaluation: none for models tuned here (trained without), eos for base OPT."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the token ids come from. Nothing is tokenised or packed inside a training job."""

    # Texts and not Paths, here and below: YAML has no paths, and the resolved copy must load again.
    train_corpus: str | None = None
    """Folder written by tools/preprocess/build_corpus.py."""
    train_plan: str | None = None
    """Folder written by tools/preprocess/build_plan.py for that corpus."""
    validation_corpus: str | None = None
    """Corpus of the validation split."""
    validation_plans: dict[str, str] = field(default_factory=dict)
    """Level of generalisation -> plan over validation_corpus, e.g. fully_held_out: plan/fully_held_out."""
    # The plan knows it too: said here, the layout can be checked and explained where no plan lies.
    row_length: int = 2048
    """Positions of one packed row, which is one micro-batch; must equal the plan's."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model and the batch are spread over ranks; data parallel size is what is left of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Stages the layers are cut into."""
    # None and not 1 for off: megatron-core takes the interleaved schedule as soon as there is a number.
    virtual_pipeline_model_parallel_size: int | None = None
    """Interleaved pipeline: model chunks per stage (2 or more), or none."""
    # A tuple: a list could be changed in spite of `frozen`.
    pipeline_layers: tuple[int, ...] | None = None
    """Layers of every pipeline chunk in order of depth, e.g. [5, 6, 6, 5]: pipeline x virtual numbers. None
    splits by cost: evenly, and what does not divide spares the head's chunk first, then the embedding's."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the row."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward already runs."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Recompute nothing, the attention, or whole layers in the backward."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full recompute: checkpoint every group of layers, or only the first layers of a stage."""
    recompute_num_layers: int = 1
    """With full recompute: layers per group (uniform) or layers recomputed (block)."""
    distributed_timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the job."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and its schedule; OPT-IML's values where the paper or metaseq state them (docs/decisions.md)."""

    # The paper's for both its sizes; warm-up, steps and batch below are those of its 30B.
    learning_rate: float = 5e-5
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate after the last step of the linear decay."""
    warmup_steps: int = 60
    """Steps of linear warm-up; the first step runs at learning_rate / warmup_steps."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and LayerNorm weights are exempt."""
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; 0 turns clipping off."""
    initial_loss_scale: float = 128.0
    """fp16 only: first loss scale. Losses are sums over targets, so this is lower than Megatron's 2^32."""
    min_loss_scale: float = 2.0**-14
    """fp16 only: the loss scale never falls below this."""
    # metaseq's. Megatron waits 1,000 steps, a quarter of this run.
    loss_scale_window: int = 256
    """fp16 only: clean steps before the loss scale doubles."""
    loss_scale_hysteresis: int = 1
    """fp16 only: overflowing steps before the loss scale halves."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The run itself."""

    output_directory: str = "runs/default"
    """Resolved config, metrics, TensorBoard events and checkpoints go here."""
    steps: int = 4000
    """Optimizer steps of the whole run; the decay ends here."""
    # Not in rows: the same number is the same batch at any row length. 256 sequences of 2,048 in the paper.
    global_batch_positions: int = 524288
    """Positions of one step over all ranks: a multiple of data.row_length x data parallel size."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of weights and activations; the optimizer keeps fp32 master weights and moments."""
    # Megatron's default; the name of the paper's run says `rs1234` as well.
    seed: int = 1234
    """Root of random weights and of every dropout mask."""
    log_interval: int = 1
    """Steps between console lines; metrics.jsonl gets every step."""
    validation_interval: int = 0
    """Steps between validation losses per level; 0 means only after the last step."""
    self_test: bool = True
    """Prove at start-up, on the layout that will train, that no document sees another."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is loaded and what is kept."""

    initial_weights: str | None = None
    """Native checkpoint or Hugging Face OPT folder to start from: weights only, everything else fresh."""
    save_interval: int = 0
    """Steps between checkpoints; 0 means only after the last step."""
    keep_last: int = 3
    """Newest complete checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: int = 0
    """Steps: complete checkpoints at multiples of this stay for good; 0 means none does."""
    keep_best: int = 0
    """Complete checkpoints with the lowest validation loss that stay; 0 means the loss decides nothing."""
    best_level: str | None = None
    """Level of data.validation_plans whose loss decides what is best; null means the mean over all levels."""
    asynchronous: bool = True
    """Write files in the background while training goes on; on a GPU host memory is set aside for it."""
    resume: bool = True
    """Go on from the newest complete checkpoint in output_directory, if there is one."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The three-level evaluation."""

    bench: str | None = None
    """Folder written by tools/preprocess/build_bench.py."""
    tokenizer: str | None = None
    """Folder with vocab.json and merges.txt."""
    split: Literal["validation", "test"] = "test"
    """Which held-out files to score."""
    # A score's standard error is then 3.2 points at most: 0.5 / sqrt(250).
    examples_per_task: int = 250
    """Examples scored per task, the first of the file; 0 means all."""
    scoring: Literal["sum", "mean"] = "sum"
    """Candidates are ranked by the sum of their tokens' log-likelihoods, or by the mean."""
    max_new_tokens: int = 256
    """Longest generated answer in tokens."""
    generation_batch_size: int = 32
    """Prompts decoded together."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run: every section, resolved and checked."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
