"""One call of `generate`: its prompt as ever, one eager step, then a capture, and replays.

    prompt            upstream's own, on its DynamicCache; then the cache is given fixed addresses
    first step        eager: whatever compiles, tunes or allocates at a first use does it here
    second step       captured, replayed once and compared with an eager step from the same states, which is what counts
    the others        replayed, as long as nothing has changed that the graph depends on
    layers are full   they grow, and the next two steps are a first and a second one again

What cannot go on like this gets its cache back as a DynamicCache and continues eagerly, for a reason with a name. A
graph lives no longer than its call. The ranks of a tensor-parallel model decide all of this together.
"""

from __future__ import annotations

import time
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from ..layer.plan import plan_of, recorded_steps
from ..switch import switched_off
from ..upstream.protocols import CausalLM, ModelCache
from . import eligible
from .caches import GrowingCache, fits, free_bytes, reviewed, total_bytes
from .capture import Graph, tensors_in, wait
from .fingerprint import PythonState
from .held import Held
from .norms import Norms
from .reasons import Eager
from .state import GIVE_UP_AFTER, State
from .together import Together, Verdict, ranks_of_model

MOST_CAPTURES = 24  # of one call: a cache that grows to a million positions has needed 19
GROUPED_FROM = 8  # sequences from which grouped_mm beats batched_mm (H100, Qwen3-Next: 4.4 against 6.6 ms a token)
# How far a replay may be from the eager step on the same states, by the model's dtype. The same kernels on the same
# numbers: 0, but for kernels that add up in no fixed order, whose last bit the layers above make more of.
DISTANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Call:
    """What `generate` steps through while it samples."""

    def __init__(self, state: State, model: CausalLM, given: dict[str, Any]):
        self.reason: Eager | None = None  # why the steps are eager
        self._state = state
        self._model = model
        self._batch = given["input_ids"].shape[0]
        self._offer = state.take_offer()
        self._may_run_ahead = not (
            given["generation_config"].return_dict_in_generate  # the cache too, which a step in vain would have changed
            or any(map(_is_foreign, (*given["logits_processor"], *given["stopping_criteria"])))
        )
        self._together = Together(ranks_of_model(model))
        self._begun = False
        self._growing: GrowingCache | None = None
        self._held: Held | None = None
        self._warm = False
        self._captures = 0
        self._eager_ms = 0.0
        self.keeps_grouped = _keeps_grouped(model, self._batch)
        state.add(grouped_calls=int(self.keeps_grouped))
        self._refused = self._refusal(given)
        if self._refused is not None and self._together.ranks is None:
            self._is_eager(self._refused)

    @property
    def eager(self) -> bool:
        """Whether the steps are upstream's own."""
        return self.reason is not None or self._refused is not None

    @property
    def runs_ahead(self) -> bool:
        """Whether `generate` may begin a step before it knows that the last one was not the end: at the end of a text
        one step is made in vain. Not where somebody else's code looks at every step, or the cache is returned."""
        return self._growing is not None and self._may_run_ahead

    def begin(self, outputs: Any) -> Any:
        """After the prompt's pass: its outputs, with a cache of fixed addresses."""
        offer = self._offer
        if self._begun or self.reason is not None:
            return outputs
        self._begun = True
        own = Verdict(self._refused or self._refusal_after(outputs), able=self._may_run_ahead)
        limit = None if offer is None else offer.limit
        agreed = self._together.agreed(f"{self._batch} sequences up to position {limit}", own)
        self._may_run_ahead = agreed.able  # where one rank makes no step in vain, none does
        if agreed.reason is not None:
            self._is_eager(agreed.reason, agreed.detail)
            return outputs
        assert offer is not None
        cache: ModelCache = outputs[offer.name]
        self._layer = next(module for module in self._model.modules() if plan_of(module) is not None)
        self._growing = GrowingCache(cache, self._model.config.get_text_config(decoder=True), offer.limit)
        outputs[offer.name] = self._growing.static
        return outputs

    def step(self, *args: Any, **inputs: Any) -> Any:
        """What `generate` calls for a token of every sequence, in the place of the model."""
        if self._growing is None or all(value is not self._growing.static for value in inputs.values()):
            return self._model(*args, **inputs)  # of a call within this one: the chunks of a prompt, for beams
        reason = self._interrupted()
        if reason is not None:
            self._together.changed(f"that it can be captured ({reason})", self._growing.length, Verdict(reason))
            return self._leave(self._model(**inputs), reason)
        if self._held is not None:
            outputs = self._replayed(self._held, inputs)
            if outputs is not None:
                return outputs
        return self._captured(inputs) if self._warm else self._first(inputs)

    def finished(self, result: Any) -> Any:
        """What `generate` returns: a cache that the caller gets is the DynamicCache that he would have got."""
        if self._growing is not None and isinstance(result, dict):
            for name, value in list(result.items()):
                if value is self._growing.static:
                    result[name] = self._growing.back()
        return result

    def close(self) -> None:
        """The call is over, however it ended."""
        self._drop()
        self._growing = None

    def settle(self) -> None:
        """Brings the layers' counters up to date."""
        if self._held is not None:
            self._held.settle()

    def _refusal(self, given: dict[str, Any]) -> Eager | None:
        offer = self._offer
        if offer is None:
            return Eager.USER_CACHE
        if offer.reason is not None:
            return Eager.OLD_TRANSFORMERS if eligible.is_old() else offer.reason  # which may have no cache to offer
        if self._state.failures >= GIVE_UP_AFTER:
            return Eager.FAILED_BEFORE
        return eligible.model_reason(self._model, bool(given.get("synced_gpus")), self._together.ranks)

    def _refusal_after(self, outputs: Any) -> Eager | None:
        """What the prompt's pass has left decides."""
        offer = self._offer
        assert offer is not None
        cache: ModelCache = outputs.get(offer.name)
        if offer.cache is None or cache is not offer.cache() or not reviewed(cache):
            return Eager.UNKNOWN_CACHE
        if all(plan_of(module) is None for module in self._model.modules()):
            return Eager.UNPATCHED
        if not fits(cache, offer.limit):
            return Eager.MEMORY
        if offer.limit - cache.get_seq_length() < eligible.FEWEST:
            return Eager.FEW_TOKENS
        return None

    def _interrupted(self) -> Eager | None:
        """What ends replaying at once, whoever did it."""
        plan = plan_of(self._layer)
        if plan is None or not plan.settings.cuda_graph:
            return Eager.UNPATCHED
        if switched_off():
            return Eager.SWITCHED_OFF
        if self._captures >= MOST_CAPTURES:
            return Eager.CHANGING
        return None

    def _first(self, inputs: dict[str, Any]) -> Any:
        """An eager step, timed: what a replay has to beat."""
        device = self._model.device
        wait(device)
        start = time.perf_counter()
        outputs = self._model(**inputs)
        wait(device)
        self._eager_ms = 1e3 * (time.perf_counter() - start)
        self._warm = True
        return self._advanced(outputs)

    def _captured(self, inputs: dict[str, Any]) -> Any:
        """A capture, its first replay, and the eager step that it is compared with."""
        growing = self._growing
        assert growing is not None
        self._captures += 1
        own = self._recorded(inputs)
        room = 2 * total_bytes(growing.states()) <= free_bytes(self._model.device)
        agreed = self._together.agreed(f"a capture at position {growing.length}", own._replace(able=room))
        if agreed.reason is not None:
            return self._leave(self._model(**inputs), agreed.reason, agreed.detail)
        held = self._held
        assert held is not None
        self._state.add(captures=1)
        self._untimed = True
        if not agreed.able:
            return self._advanced(self._counted(held, inputs))
        outputs, distance = self._compared(held.graph, inputs)
        own = Verdict()
        if not distance <= DISTANCE.get(self._model.dtype, 0.0):
            own = Verdict(Eager.DIFFERS, f"by {distance:.2g}, relatively")
        agreed = self._together.agreed(f"a comparison at position {growing.length}", own)
        if agreed.reason is not None:
            return self._leave(outputs, agreed.reason, agreed.detail)
        return self._advanced(outputs)

    def _recorded(self, inputs: dict[str, Any]) -> Verdict:
        """Records a step, which is not executed; why it cannot be replayed, if so."""
        growing = self._growing
        assert growing is not None
        norms = Norms(self._model, self._batch)
        python, values = PythonState(self._model), growing.python_values()
        try:
            with recorded_steps() as steps:
                graph = Graph(self._state.pool(self._model.device), norms.stood_in_for(self._model), inputs)
        except Exception as error:  # whatever a forward may raise: the eager step raises it again if it is not ours
            python.put_back()
            self._state.failures += 1
            return Verdict(Eager.CAPTURE_FAILED, f"{type(error).__name__}: {error}")
        self._state.failures = 0
        growing.hold_debts()
        changed = python.put_back()
        self._held = Held(self._model, growing, graph, steps)
        if changed is not None or values != growing.python_values():
            return Verdict(Eager.SIDE_EFFECT, changed or "the cache")
        self._state.norms = norms
        return Verdict()

    def _compared(self, graph: Graph, inputs: dict[str, Any]) -> tuple[Any, float]:
        """The step's outputs, and how far the replay was from the eager step, which is what counts. Both start from the
        same states."""
        growing = self._growing
        assert growing is not None
        states = growing.states()
        saved = [state.clone() for state in states]
        replayed = graph.replay(inputs)
        for state, before in zip(states, saved, strict=True):  # the live ones are again what they were
            after = state.clone()
            state.copy_(before)
            before.copy_(after)
        growing.rewind()
        outputs = self._model(**inputs)
        distance = _distance([*tensors_in(replayed), *saved], [*tensors_in(outputs), *states])
        self._state.add(compared=1)
        self._state.worst = max(self._state.worst, distance)
        return outputs, distance

    def _replayed(self, held: Held, inputs: dict[str, Any]) -> Any | None:
        """The outputs of a replay; None where something has changed, and the step is still to be made."""
        growing = self._growing
        assert growing is not None
        changed = held.changed(inputs)
        if changed is not None:
            agreed = self._together.changed(changed, growing.length, Verdict())
            if agreed.reason is not None:
                return self._leave(self._model(**inputs), agreed.reason, agreed.detail)
            self._drop()
            return None
        start, timed = time.perf_counter(), self._untimed
        outputs = self._counted(held, inputs)
        if timed:
            self._untimed = False
            wait(self._model.device)
            faster = worth_it(self._eager_ms, 1e3 * (time.perf_counter() - start))
            own = Verdict() if faster else Verdict(Eager.NOT_FASTER)
            agreed = self._together.agreed(f"the time at position {growing.length}", own)
            if agreed.reason is not None:
                return self._leave(outputs, agreed.reason, agreed.detail)
        return self._advanced(outputs)

    def _counted(self, held: Held, inputs: dict[str, Any]) -> Any:
        """The outputs of a replay that counts."""
        outputs = held.graph.replay(inputs)
        held.count()
        self._state.add(replays=1, tokens=self._batch)
        return outputs

    def _advanced(self, outputs: Any) -> Any:
        """A step is done. Layers that are full grow, which makes a graph of them useless."""
        growing = self._growing
        assert growing is not None
        if growing.fills_up():  # by their length, which is the same on every rank
            own = Verdict() if growing.may_grow() else Verdict(Eager.MEMORY)
            agreed = self._together.agreed(f"longer layers at position {growing.length}", own)
            if agreed.reason is not None:
                return self._leave(outputs, agreed.reason, agreed.detail)
        if growing.advance():
            self._drop()
        return outputs

    def _leave(self, outputs: Any, reason: Eager, detail: str = "") -> Any:
        """A step is done, and those to come are eager, on the cache that `generate` would have had."""
        growing, offer = self._growing, self._offer
        assert growing is not None
        assert offer is not None
        self._drop()
        growing.length += 1
        outputs[offer.name] = growing.back()
        self._growing = None
        self._is_eager(reason, detail)
        return outputs

    def _is_eager(self, reason: Eager, detail: str = "") -> None:
        self.reason = reason
        self._state.count(reason, detail)
        if detail and reason not in _warned.setdefault(self._state, set()):
            _warned[self._state].add(reason)
            warnings.warn(
                f"qwen_fastdecode, cuda_graph=True: decoding goes on eagerly: {reason} ({detail})", stacklevel=2
            )

    def _drop(self) -> None:
        """The graph goes; a next one is preceded by an eager step."""
        if self._growing is not None:
            self._growing.release_debts()
        if self._held is not None:
            self._held.close()
        self._held, self._warm = None, False


_warned: weakref.WeakKeyDictionary[State, set[Eager]] = weakref.WeakKeyDictionary()


def worth_it(eager_ms: float, replay_ms: float) -> bool:
    """Whether a replay is faster than the eager step was."""
    return replay_ms < 0.95 * eager_ms


def _keeps_grouped(model: CausalLM, batch: int) -> bool:
    """Whether upstream's switch of experts from grouped_mm to batched_mm, which it makes for decoding, is left out."""
    config = model.config.get_text_config(decoder=True)
    grouped = getattr(config, "_experts_implementation", None) == "grouped_mm"
    return grouped and batch >= GROUPED_FROM and eligible.device_is_supported(model.device)


def _is_foreign(part: Any) -> bool:
    return not type(part).__module__.startswith(("transformers.", "qwen_fastdecode."))


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of a tensor from the one that was expected; NaN is infinitely far."""
    norms = []
    for a, b in zip(found, expected, strict=True):
        exact = torch.float64 if b.dtype == torch.float64 else torch.float32
        norms += [(a.to(exact) - b.to(exact)).norm().double(), b.to(exact).norm().double()]
    values = torch.stack(norms).tolist()
    pairs = zip(values[::2], values[1::2], strict=True)
    own = [0.0 if apart == 0 else apart / max(size, 1e-30) for apart, size in pairs]
    return max(own) if all(distance < float("inf") for distance in own) else float("inf")
