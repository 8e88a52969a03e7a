# --- The guide ---------------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """A factored layer and a dense matrix that guides it while it learns: y = alpha W x + (1 - alpha) B (A x) + bias.

    W starts as the product of the factors, so at first alpha changes nothing, and goes when alpha is 0. set_guides says
    before each step whether W takes part and with what alpha; in evaluation it never does.
    """

    layer: Any  # BlockDense, BlockShuffle or LowRank
    alpha: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.guiding = layer, True
        self.guide = nn.Parameter(layer.materialise().detach().clone())  # (C_out, C_in)
        # A tensor, since torch.compile would make a graph for every value of a number
        self.register_buffer("alpha", self.guide.new_ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if not (self.guiding and self.training):
            return y
        return torch.lerp(y, linear(x, self.guide, self.layer.bias), self.alpha.to(y.dtype))

    # While it learns nothing of it is narrow; in evaluation it is the layer alone, whose latents decoding keeps.

    @property
    def rank(self) -> int:
        return 0 if self.training else self.layer.rank

    @property
    def B(self) -> Tensor:
        return self.layer.B

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def narrow(self, x: Tensor) -> Tensor:
        return self(x) if self.training else self.layer.narrow(x)

    def widen(self, y: Tensor) -> Tensor:
        return y if self.training else self.layer.widen(y)


def add_guides(model: nn.Module) -> None:
    """Wrap every factored layer."""
    factored = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "materialise")]
    for name, layer in factored:
        model.set_submodule(name, Guided(layer))


def drop_guides(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Unwrap the layers, and let the optimizers forget the guides: what is saved then holds nothing of them."""
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, Guided)]:
        model.set_submodule(name, module.layer)
    for optimizer in optimizers:
        for group in [group for group in optimizer.param_groups if group["name"] == "guides"]:
            for p in group["params"]:
                optimizer.state.pop(p, None)
            optimizer.param_groups.remove(group)


def without_guides(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A guided model's state_dict -> that of the model without guides; any other as it is."""
    guided = {name.removesuffix("guide") for name in state if name.endswith(".guide")}
    kept = {}
    for name, tensor in state.items():
        if not name.endswith(".guide"):
            prefix = name.rpartition("layer.")[0]
            kept[prefix + name.removeprefix(f"{prefix}layer.") if prefix in guided else name] = tensor
    return kept


def set_guides(model: nn.Module, step: int, guided_steps: int, seed: int) -> None:
    """Say whether the guides take part in the update after `step` finished ones: with probability alpha.

    alpha falls from 1 to 0 as a cosine over guided_steps. One draw for all layers, a function of (seed, step), so that
    ranks and resumed runs agree and a compiled model needs two graphs. Published: a draw for each layer.
    """
    alpha = (1 + math.cos(math.pi * step / guided_steps)) / 2
    guiding = random.Random(f"guide {seed} {step}").random() < alpha
    for module in model.modules():
        if isinstance(module, Guided):
            module.guiding = guiding
            module.alpha.fill_(alpha)


def guide_flops(model: nn.Module) -> int:
    """FLOPs a token that guides, not yet there, would add to a forward pass in which they take part."""
    factored = [m for m in model.modules() if hasattr(m, "materialise")]
    return sum(2 * math.prod(m.materialise().shape) for m in factored)


def fixed_flop_ratio(dense: int, structured: int, guide: int) -> float:
    """The guided share that makes a self-guided run cost what the dense twin costs, from forward FLOPs a token.

    A run of n new steps, r n of them guided, is followed by r n more over the guided phase's tokens: it costs
    n ((1 + r) structured + r guide / 2) = n dense, as the guide takes part in half of the guided steps on average.
    The published ratios, .301 for size s, charge attention for the whole square of the context; train.py counts what
    the causal mask leaves, and finds .327.
    """
    return (dense - structured) / (guide / 2 + structured)
