"""Each objective and option in a line, for model cards and reports; the code is elsewhere."""

from __future__ import annotations

# What each objective minimises, for model cards and reports.
_ON_BOTH = "w_f {} + w_r {}, means over the pairs of a step"
_RETAIN = "nll_r/|y_r|"
FORMULAS: dict[str, str] = {
    "simnpo": _ON_BOTH.format("(-2/beta) log sigmoid(beta nll_f/|y_f| - gamma)", _RETAIN),
    "simnpo-readme": _ON_BOTH.format("(-2/beta) log sigmoid(beta nll_f/|y_f| - gamma)", _RETAIN),
    "npo": _ON_BOTH.format("(-2/beta) log sigmoid(beta (nll_f - nll_f,reference))", _RETAIN),
    "grad_ascent": "w_f (-nll_f/|y_f|), mean over the forget rows of a step",
    "grad_diff": _ON_BOTH.format("(-nll_f/|y_f|)", _RETAIN),
    "kl": _ON_BOTH.format("(-nll_f/|y_f|)", "KL(reference || model) on the retain answer"),
    "idk": _ON_BOTH.format("nll of a refusal/|y|", _RETAIN),
    "dpo": _ON_BOTH.format(
        "(-2/beta) log sigmoid(beta ((nll_refusal,reference - nll_refusal) - "
        "(nll_f,reference - nll_f)))",
        _RETAIN,
    ),
    "rmu": _ON_BOTH.format(
        "mean over answer positions and width of (h_f - c u)^2",
        "that of (h_r - h_r,reference)^2, h the output of block rmu_layer, c = rmu_coefficient, "
        "u uniform in [0, 1) scaled to length 1",
    ),
    "undial": _ON_BOTH.format(
        "cross-entropy to softmax(reference logits - beta on the true token), mean over y_f",
        _RETAIN,
    ),
    "wga": _ON_BOTH.format("(-mean over y_f of p^beta nll, p^beta held fixed)", _RETAIN),
    "satimp": _ON_BOTH.format(
        "(-mean over y_f of p^beta (1-p)^beta2 nll, both factors held fixed)", _RETAIN
    ),
    "ceu": _ON_BOTH.format(
        "cross-entropy to the model's own distribution (held fixed) without the true token, mean "
        "over y_f without its first ceu_skip tokens",
        _RETAIN,
    ),
}

# What these settings of the training add to any of them.
OPTION_FORMULAS: dict[str, str] = {
    "alternates": "+ w_a nll_a/|y_a|, y_a one of the answers of the nearest retain questions, put "
    "to the forget question, each target of it (1 - alternate_smoothing) of the token and "
    "alternate_smoothing of the uniform distribution",
    "sam_rho": "the forget gradient is taken at theta + sam_rho g/|g|, g the forget gradient of "
    "the whole step at theta",
    "attack_weight": "+ w_x of the forget value with margin attack_gamma on the model under a "
    "simulated relearning attack, begun anew every attack_steps",
    "noise_scale": "in training y = W x + s B A x + noise_scale E x, E random with nf4's rounding "
    "error as its size, one draw a step",
}
