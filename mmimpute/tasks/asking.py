"""The tasks by name, asked of the same people."""

from collections.abc import Sequence

from mmimpute.data.profile import SMALLEST_GROUP
from mmimpute.errors import UserError
from mmimpute.tasks.classifier import classifiers
from mmimpute.tasks.coherence import coherence, drawn, synthetic
from mmimpute.tasks.likelihood import likelihood
from mmimpute.tasks.people import People, check_label, people_of
from mmimpute.tasks.probe import probe
from mmimpute.tasks.quality import quality
from mmimpute.tasks.retrieval import retrieval

__all__ = ["ask", "check_label", "people_of"]


def ask(people: People, tasks: Sequence[str]) -> dict:
    """Task -> what it found. Raises UserError where there are too few people for anything."""
    if len(people.x) < SMALLEST_GROUP:
        raise UserError(f"fewer than {SMALLEST_GROUP} people that no part of the model has seen: no tasks")
    found = {}
    if {"coherence", "quality"} & set(tasks):
        by, draws, generated = classifiers(people), drawn(people), synthetic(people)
        found |= {"coherence": coherence(people, by, draws, generated)} if "coherence" in tasks else {}
        found |= {"quality": quality(people, by, draws, generated)} if "quality" in tasks else {}
    alone = {"likelihood": likelihood, "probe": probe, "retrieval": retrieval}
    return found | {name: alone[name](people) for name in tasks if name in alone}
