"""The registry of what can be reduced: families of encoders, token decoders after them, and readers around them.

`families.py` declares those that come with the package; `register_family` adds one from outside. Layers, how they take
an attention bias, and what else they are given (relative position bias, rotary embeddings) are found by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import AiluRusError


def qualified_name(module: nn.Module | type) -> str:
    """The name of a class, or of an object's class, with its module."""
    kind = module if isinstance(module, type) else type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def patch_grid(encoder: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of images Tensor[B, 3, H, W], by the config's patch_size."""
    patch: Any = encoder.config.patch_size  # type: ignore[union-attr]
    patch_height, patch_width = patch if isinstance(patch, Sequence) else (patch, patch)
    return pixel_values.shape[-2] // patch_height, pixel_values.shape[-1] // patch_width


@dataclass(frozen=True)
class Family:
    """An encoder class that can be reduced.

    Its layers are found as the one `nn.ModuleList` of `config.num_hidden_layers` modules that take `hidden_states`.
    They have to take an attention bias: as `attention_mask`, or by handing unknown keyword arguments on to an attention
    function of transformers' registry.

    Args:
        name: what users call the family.
        encoder: the class or its qualified name. It has to match exactly: a subclass may do anything between its
            layers.
        prefix: tokens before the patches (CLS, distillation), or what counts them, called with the encoder.
        registers: the config's field that counts registers, which follow the prefix; None: there are none.
        suffix: the config's field that counts tokens after the patches; None: there are none.
        queries: the config's field that counts tokens that join before the patches at a late layer; None: none do.
        models: what users load that has this encoder inside, for the table of supported models.
        grid: the patch grid of an input, called with the encoder and its first argument; by default by
            `config.patch_size`.
        layout: where the arguments of a forward say it instead, called with the encoder and these arguments by name:
            the grid, and how many tokens of padding follow it.
        reads: the hidden states that the class itself reads (a backbone's feature maps), called with the encoder; None:
            it is no backbone.
        between: the layers whose output the class reads on the grid before the next layer, called with the encoder;
            None: there never are any.
        prepare: called with the encoder and the arguments of a forward by name, which it may change; raises
            AiluRusError on what cannot be reduced.
        methods: other methods that run all layers, as paths from the encoder ("timm_model.forward_features"); they are
            reduced, too, where they are called instead of the encoder.

    Example:
        register_family(Family("MyViT", MyViTModel, prefix=1))
        apply_ailurus(MyViTModel(config), cluster_location=2, keep_ratio=0.5)
    """

    name: str
    encoder: str | type[nn.Module]
    prefix: int | Callable[[Any], int] = 0
    registers: str | None = None
    suffix: str | None = None
    queries: str | None = None
    models: str = ""
    grid: Callable[[Any, Tensor], tuple[int, int]] = patch_grid
    layout: Callable[[Any, dict[str, Any]], tuple[tuple[int, int], int]] | None = None
    reads: Callable[[Any], Iterable[int]] | None = None
    between: Callable[[Any], Iterable[int]] | None = None
    prepare: Callable[[Any, dict[str, Any]], None] | None = None
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _by_name(self, "encoder")

    @property
    def key(self) -> str:
        """The qualified name of the encoder's class."""
        return str(self.encoder)

    def __reduce__(self) -> Any:
        # A reduced model is pickled with its family, whose functions may be lambdas.
        return _registered_family, (self.key,)


@dataclass(frozen=True)
class TokenDecoder:
    """A module from tokens Tensor[B, L, C] to scores Tensor[B, L, K], for any L, before any grid is made of them.

    Args:
        decoder: the class or its qualified name. Its layers, if it has any, are `decoder.layers`.
        suffix: the attribute that says how many tokens its layers have after the patches; None: none.

    Example:
        register_token_decoder(TokenDecoder(MyDecoder))
    """

    decoder: str | type[nn.Module]
    suffix: str | None = None

    def __post_init__(self) -> None:
        _by_name(self, "decoder")

    @property
    def key(self) -> str:
        """The qualified name of the decoder's class."""
        return str(self.decoder)


@dataclass(frozen=True)
class Reader:
    """A class with an encoder inside that reads some of its hidden states: only those are unmerged.

    Args:
        reader: the class or its qualified name.
        reads: the numbers of the hidden states that it reads, 0 the embeddings, called with the module.

    Example:
        register_reader(Reader(MyDetector, reads=lambda detector: (2, 4)))
    """

    reader: str | type[nn.Module]
    reads: Callable[[Any], Iterable[int]]

    def __post_init__(self) -> None:
        _by_name(self, "reader")

    @property
    def key(self) -> str:
        """The qualified name of the reader's class."""
        return str(self.reader)

    def __reduce__(self) -> Any:
        return _registered_reader, (self.key,)


Entry = TypeVar("Entry", Family, TokenDecoder, Reader)

FAMILIES: dict[str, Family] = {}
TOKEN_DECODERS: dict[str, TokenDecoder] = {}
READERS: dict[str, Reader] = {}


def register_family(family: Family) -> Family:
    """Has `apply_ailurus` reduce a class of encoders, alone and inside other models.

    Args:
        family: the declaration.

    Returns:
        The family. To register an equal one again does nothing.

    Raises:
        AiluRusError: its class is registered with other settings.

    Example:
        register_family(Family("MyViT", MyViTModel, prefix=1))
    """
    return _register(FAMILIES, family)


def register_token_decoder(decoder: TokenDecoder) -> TokenDecoder:
    """Has `restore_at="decoder"` run a class of decoders on representatives.

    Args:
        decoder: the declaration.

    Returns:
        The decoder. To register an equal one again does nothing.

    Raises:
        AiluRusError: its class is registered with other settings.

    Example:
        register_token_decoder(TokenDecoder(MyDecoder))
    """
    return _register(TOKEN_DECODERS, decoder)


def register_reader(reader: Reader) -> Reader:
    """Declares which hidden states a class reads from the encoder inside it: only those are unmerged.

    Args:
        reader: the declaration.

    Returns:
        The reader. To register an equal one again does nothing.

    Raises:
        AiluRusError: its class is registered with other settings.

    Example:
        register_reader(Reader(MyDetector, reads=lambda detector: (2, 4)))
    """
    return _register(READERS, reader)


def _register(registry: dict[str, Entry], entry: Entry) -> Entry:
    known = registry.setdefault(entry.key, entry)
    if known != entry:
        raise AiluRusError(f"{entry.key} is registered already, with other settings: {known}")
    return known


def _by_name(entry: object, field: str) -> None:
    """Turns a class into its qualified name, which needs nothing to be imported."""
    value = getattr(entry, field)
    if isinstance(value, type):
        object.__setattr__(entry, field, qualified_name(value))
    elif not isinstance(value, str) or "." not in value:
        raise AiluRusError(f"{field} has to be a class or its qualified name with the module, got {value!r}")


def _registered_family(key: str) -> Family:
    return _unpickled(FAMILIES, key)


def _registered_reader(key: str) -> Reader:
    return _unpickled(READERS, key)


def _unpickled(registry: dict[str, Entry], key: str) -> Entry:
    if key not in registry:
        raise AiluRusError(f"{key} is not registered here: register it before a reduced model is unpickled")
    return registry[key]
