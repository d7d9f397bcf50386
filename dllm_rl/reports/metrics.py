"""Every metric that a run writes: its name and unit in one place. Algorithms declare their own, Algorithm.metrics."""

from __future__ import annotations

from collections.abc import Mapping

from dllm_rl.types import Metric

METRICS: Mapping[str, Metric] = {
    "reward": Metric("", "mean total reward over scored samples; one of several turns counts with their mean"),
    "reward_deviation": Metric("", "mean standard deviation of the total reward within a group"),
    "reward/*": Metric("", "mean of one reward component over samples it applies to"),
    "success": Metric("share", "samples whose success component reaches 1"),
    "failed_rows": Metric("share", "rows that a verifier failed to score; excluded, not scored 0"),
    "timed_out_rows": Metric("share", "rows among them whose verifier ran past its deadline; absent where none failed"),
    "zero_variance_groups": Metric("share", "groups whose rewards are all equal: no gradient from them"),
    "kept_rows": Metric("share", "rows that the algorithm trains on; 0 = a step without an update"),
    "all_wrong_groups": Metric("share", "groups without a solved row"),
    "flat_groups": Metric(
        "share", "groups that teach nothing: no row is kept and has an advantage; before others come"
    ),
    "resample_rounds": Metric("rounds", "rounds of data.resample_flat_groups that decoded further prompts"),
    "resample_prompts": Metric("prompts", "prompts that they decoded, used or not"),
    "resampled/*": Metric("", "the same figure after groups of other prompts have replaced flat ones"),
    "hinted_rows": Metric("share", "rows that were decoded around injected hints"),
    "guided/*": Metric("", "the same figure after hinted rollouts have replaced some of the ordinary ones"),
    "unique_completions": Metric("share", "distinct completions within groups"),
    "completion_tokens": Metric("tokens", "mean completion length, up to and including EOS"),
    "tokens_per_forward": Metric("tokens", "completion tokens per denoising forward"),
    "behaviour_logp": Metric("nats", "mean log-probability of a committed token when it was committed"),
    "confidence": Metric("", "mean probability of a generated token when it was committed"),
    "confident_tokens": Metric(
        "share", "generated tokens of a probability above 0.9; drifts up in overconfident models"
    ),
    "loss": Metric("", "the algorithm's loss"),
    "grad_norm": Metric("", "global gradient norm before clipping"),
    "lr": Metric("", "learning rate"),
    "clip_fraction": Metric("share", "tokens whose gradient the clip removed"),
    "log_ratio_mean": Metric("nats", "mean of log new - log old over the ratio's units: tokens, rows or forwards"),
    "log_ratio_deviation": Metric("nats", "standard deviation of log new - log old over the same"),
    "rollout_gap": Metric(
        "nats", "mean difference of the engine's and the learner's log-probability of a token, a few rows"
    ),
    "rollout_gap_max": Metric("nats", "the largest such difference"),
    "ratio_noise": Metric("nats", "what rounding alone does to a log-likelihood per token; at the start, in bfloat16"),
    "log_ratio_cut": Metric("share", "ratios beyond max_log_ratio nats: cut, and without gradient"),
    "effective_samples": Metric("share", "(mean ratio)^2 / mean ratio^2 over the same; 1 = on policy"),
    "estimate_deviation": Metric("nats", "spread of a row's log-likelihood over fresh mask draws, a few rows"),
    "estimate_deviation_per_token": Metric("nats", "the same, per scored token"),
    "preference_accuracy": Metric("share", "pairs whose chosen completion gained more than its rejected one"),
    "preference_margin": Metric("", "mean preference score, beta times the difference of the gains"),
    "value_loss": Metric("", "clipped squared error of the value model, half, per token"),
    "kl": Metric("nats", "mean divergence per token from the anchor"),
    "rollout_s": Metric("s", "time of generation"),
    "reward_s": Metric("s", "time of verification"),
    "score_s": Metric("s", "time of reference scoring"),
    "diagnose_s": Metric("s", "time of re-drawing masks for estimate_deviation"),
    "update_s": Metric("s", "time of forward, backward and optimiser"),
    "paused_rows": Metric("share", "completions that paused for new weights and went on with them"),
    "staleness": Metric("steps", "mean age of the weights that decoded the batch"),
    "stale_ratio": Metric("", "mean importance ratio of stale tokens or completions, before truncation"),
    "stale_truncated": Metric("share", "of them, those whose ratio was cut"),
    "wait_s": Metric("s", "time that the learner waited for its batch"),
    "sleep_s": Metric("s", "time of clearing shared devices of the engines' weights and of bringing them back"),
    "push_s": Metric("s", "time of handing weights to the engines"),
    "step_s": Metric("s", "time of the whole step"),
    "other_s": Metric("s", "rest of the step: the driver's own work"),
    "usage/*/rss_mb": Metric("MB", "resident memory of driver, engine or learner"),
    "usage/*/cpu_percent": Metric("%", "processor time of driver, engine or learner, of one core, since the last step"),
    "usage/*/busy_percent": Metric("%", "share of the time since the last step that an engine or learner had work"),
    "usage/*/gpu_mb": Metric("MB", "memory that an engine or learner holds on its accelerator"),
    "usage/*/gpu_percent": Metric("%", "how busy that accelerator is"),
    "eval/*/success": Metric("share", "held-out examples solved, at a decoding speed"),
    "eval/*/tokens_per_forward": Metric("tokens", "held-out completion tokens per denoising forward"),
    "eval/loss": Metric(
        "nats",
        "mean negative likelihood bound per token of held-out demonstrations; every time by the same draws",
    ),
    "eval/*": Metric("", "other held-out figures, at a decoding speed"),
}


def describe(name: str, own: Mapping[str, Metric] = METRICS) -> Metric:
    """The declaration of a metric, by its own name or a pattern of METRICS.

    Args:
        name: of the metric.
        own: further declarations, of an algorithm.
    Raises:
        KeyError: an undeclared metric.
    """
    known = {**METRICS, **own}
    if name in known:
        return known[name]
    parts = name.split("/")
    for pattern in ("/".join([parts[0], "*", parts[-1]]), f"{parts[0]}/*"):
        if len(parts) > 1 and pattern in known:
            return known[pattern]
    raise KeyError(f"metric '{name}' is not declared in dllm_rl/reports/metrics.py or Algorithm.metrics")
