"""Initial states without arrays, and initial states created directly on the devices where they live."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import jax
import keras  # noqa: F401  (for the examples in docstrings)
from jaxtyping import PyTree

from research.core.state import InvalidArgument, count_parameters  # noqa: F401  (`count_parameters`: for an example)
from research.errors import user_frame

S = TypeVar("S", covariant=True)


@runtime_checkable
class Initializable(Protocol[S]):
    """Anything that makes its own initial state; every `Learner` does.

    >>> from research.core.learner import Learner
    >>> isinstance(Learner(*[None] * 6), Initializable)
    True
    """

    @property
    def init(self) -> Callable[[], S]:
        """Returns the initial state when called."""
        ...


L = TypeVar("L", bound=Initializable[Any])


def init_abstract(build: Callable[[], L]) -> tuple[L, PyTree]:
    """Runs a builder for its shapes alone: no array is made, however large the model.

    Returns the learner and its state as `jax.ShapeDtypeStruct`s. The learner's functions take any state of these shapes; the
    Keras objects behind it have no values until `write_back`. A model with constants that were computed while it was built
    (`keras.ops.arange(10)` in a functional one) is built again when one of its functions is traced. Work in the builder that
    needs values, such as training a teacher, belongs in `with jax.ensure_compile_time_eval():`; elsewhere it raises
    `InvalidArgument`.

    >>> import research
    >>> def build():
    ...     model = keras.Sequential([keras.Input((1_000_000,)), keras.layers.Dense(10_000)])
    ...     return research.supervised(model, loss="mse", optimizer="adam")
    >>> learner, shapes = init_abstract(build)
    >>> count_parameters(shapes)
    10000010000
    """
    learners: list[L] = []

    def init() -> PyTree:
        learners.append(_traced(build))
        return learners[0].init()

    shapes = jax.eval_shape(init)
    return _rebuild_lost_constants(learners[0], build), shapes


def _rebuild_lost_constants(learner: L, build: Callable[[], L]) -> L:
    """Returns the learner; a function of it whose constants ended with the trace it was built in is a new learner's."""
    fields: dict[str, Any] = cast(Any, learner)._asdict() if isinstance(learner, tuple) else {}
    usable: dict[str, bool] = {}

    def checked(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name not in usable:
                consts = jax.make_jaxpr(fields[name])(*args).consts
                usable[name] = not any(isinstance(const, jax.core.Tracer) for const in consts)
            return (fields[name] if usable[name] else getattr(_traced(build), name))(*args)

        return call

    # `state_mapping` returns Keras variables, which is no traced function.
    changed = {name: checked(name) for name, field in fields.items() if callable(field) and name != "state_mapping"}
    return cast(Any, learner)._replace(**changed) if changed else learner


def init_sharded(build: Callable[[], L], shardings: PyTree | Callable[[PyTree], PyTree]) -> tuple[L, PyTree]:
    """Builds a learner and creates its initial state directly with these shardings, never complete on one device.

    `shardings` is a sharding, a tree of them that is a prefix of the state, or a function from the state's shapes to one. The
    builder runs twice (for shapes, then inside `jax.jit(..., out_shardings=...)`), so it must set its own seed: call
    `keras.utils.set_random_seed(seed)` in it. Work that needs values: see `init_abstract`. Raises `InvalidArgument` if its second
    run makes another state.

    >>> import research
    >>> def build():
    ...     keras.utils.set_random_seed(0)
    ...     return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    >>> learner, state = init_sharded(build, device)
    >>> state.trainable[0].shape, state.trainable[0].sharding == device
    ((4, 2), True)
    """
    learner, shapes = init_abstract(build)
    if callable(shardings):
        shardings = shardings(shapes)
    return learner, init_again(build, shapes, shardings)


def init_again(build: Callable[[], Initializable[Any]], shapes: PyTree, shardings: PyTree) -> PyTree:
    """Returns the initial state of a builder whose first run had the state `shapes`, created with these shardings.

    >>> import research
    >>> def build():
    ...     return research.supervised(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), loss="mse")
    >>> _, shapes = init_abstract(build)
    >>> init_again(build, shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0])).trainable[0].shape
    (4, 2)
    """

    def leaves(state: PyTree) -> dict[str, Any]:
        return {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}

    def init() -> PyTree:
        state = _traced(build).init()
        then, now = leaves(shapes), leaves(state)
        for path in {**then, **now}:
            if then.get(path) != now.get(path):
                raise InvalidArgument(
                    f"init_sharded: the builder runs twice, and {path} is {_describe(now.get(path))} in its second run, "
                    f"{_describe(then.get(path))} in its first; expected the same state: let it keep nothing between runs."
                )
        return state

    return jax.jit(init, out_shardings=shardings)()


def _describe(leaf: Any) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{list(leaf[0])}"


def _traced(build: Callable[[], L]) -> L:
    """Returns what a builder builds while it is traced. Raises `InvalidArgument` if it reads the value of an array."""
    try:
        return build()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, _NO_VALUE) or "traced array" in str(cause)):
            cause = cause.__cause__
        if cause is None:
            raise
        frame = user_frame(cause) or user_frame(error)
        where = "" if frame is None else f" at {frame[0]}:{frame[1]}"
        raise InvalidArgument(
            f"the builder needs the value of an array{where}, but it runs for its shapes alone, as with --mesh: put work with "
            "values, such as training a teacher, in `with jax.ensure_compile_time_eval():`, or do it before."
        ) from error


_NO_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.UnexpectedTracerError,
)
