"""An adapter on the ladder: the first rung that passes, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safelora_vllm.errors import Reason
from safelora_vllm.exam.ladder import largest_bound, name_of
from safelora_vllm.exam.score import Score
from safelora_vllm.policy import Policy

_SEEN = "the adapter makes the aligned model's refusals of harmful requests too unlikely"
_CURE = (
    "Remove answers to harmful requests from its training data or, as honest training erodes refusals too, "
    "mix in harmful requests with the aligned model's own refusals; and tell the operator, who may use a "
    "stricter policy or a second opinion"
)
REFUSED = Reason("exam", f"on every rung of the ladder {_SEEN}. {_CURE}")
REFUSED_BY_ONE = Reason("exam", f"by the only policy that was tried, {_SEEN}. {_CURE}")
# What an adapter scores when it is published under a policy.
Examined = Callable[[Policy], Score]


@dataclass(frozen=True)
class Sat:
    """One rung: its policy and the score of what it would serve."""

    policy: Policy
    score: Score
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """Every rung that was tried, mildest first; the last one passed, or none did.

    threshold: the largest bound that passes, nats per token. digest: of the content that was examined, as in
    a report; empty where nobody said it.
    """

    rungs: tuple[Sat, ...]
    threshold: float
    digest: str = ""

    @property
    def policy(self) -> Policy | None:
        """The policy to serve the adapter by; None: it is refused."""
        last = self.rungs[-1]
        return last.policy if last.passed else None

    @property
    def reason(self) -> Reason | None:
        """Why it is refused. It says nothing of single probes."""
        return None if self.policy is not None else refusal(len(self.rungs))

    def by_opinion(self, sat: Sat) -> bool:
        """Whether a rung passed by its second opinion only: by its score alone it would have failed."""
        return sat.passed and not sat.score.passes(self.threshold)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: scores in nats per token."""
        rungs = [
            {
                "rung": name_of(sat.policy),
                "passed": sat.passed,
                "by_opinion": self.by_opinion(sat),
                **asdict(sat.score),
            }
            for sat in self.rungs
        ]
        served = name_of(self.policy) if self.policy else None
        return {"served": served, "digest": self.digest, "threshold": self.threshold, "rungs": rungs}


def refusal(rungs: int) -> Reason:
    """Why an adapter is refused that failed on so many rungs."""
    return REFUSED if rungs > 1 else REFUSED_BY_ONE


def sit(ladder: Sequence[Policy], examined: Examined, threshold: float) -> Verdict:
    """Try the rungs in turn and stop at the first that passes."""
    tried: list[Sat] = []
    for policy in ladder:
        score = examined(policy)
        tried.append(Sat(policy, score, score.passes(largest_bound(policy, ladder, threshold))))
        if tried[-1].passed:
            break
    return Verdict(tuple(tried), threshold)


def threshold_for(honest: Sequence[Score]) -> float:
    """The smallest threshold that serves every honest adapter at the rung that these are the scores of."""
    return max(score.bound for score in honest)
