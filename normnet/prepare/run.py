"""Prepare many cases into a store; a broken one is reported and the others go on (PAPER.md IV-A, IV-B)."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lesionsynth.files import claimed, refuse_foreign
from lesionsynth.io import Found
from lesionsynth.strict import name_of
from normnet.cases import Case, find_cases
from normnet.config import OUTPUTS, Task
from normnet.prepare.case import ISO_SPACING, LungMethod, Side, check_grid, check_lungs
from normnet.prepare.exclude import read_exclusions
from normnet.prepare.grid import Spacing
from normnet.prepare.luna import find_annotations, match_annotations
from normnet.prepare.store import Store, case_name_for_store
from normnet.prepare.summary import CaseSummary, Summary, is_summary, write_csv
from normnet.prepare.work import Work, attempt, failed
from normnet.prepare.workers import Died, run_parallel

__all__ = ["CaseSummary", "Summary", "prepare"]


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    masks: str | os.PathLike[str] | None = None,
    label: Sequence[int] = (),
    exclude: str | os.PathLike[str] | None = None,
    annotations: str | os.PathLike[str] | None = None,
    keep_lung: Mapping[str, Side] | None = None,
    names: Sequence[str] | None = None,
    series: str = "largest",
    lungs: LungMethod | None = None,
    task: Task = "lesions",
    spacing: Spacing = ISO_SPACING,
    size: int = 512,
    overwrite: bool = False,
    workers: int = 1,
    report: Callable[[CaseSummary], None] | None = None,
) -> Summary:
    """Read, segment, resample and store CT volumes for training.

    Parameters
    ----------
    inputs : sequence of paths
        Volume files, DICOM folders, and folders of these to any depth, LUNA16's among them; or one CSV. See
        `normnet.cases.find_cases`. A case is named after its file or folder.
    output : path
        Store to make or to go on with; finished cases are kept, what a killed run left is taken away.
    masks : path, optional
        Lung mask for a single input, or a folder where each case has one: ``<case>.nii.gz`` (or nrrd, mha,
        mhd, ``.seg.nrrd``), else the only ``<case>_*``. Omitted: the lungs are segmented.
    label : sequence of int
        Labels of the `masks` that are lung; all above zero where omitted.
    exclude : path, optional
        CSV ``case,first_slice,last_slice``: slices of the file, from 0 at the feet, ends included, left out.
    annotations : path, optional
        LUNA16-style CSV ``seriesuid,coordX,coordY,coordZ,diameter_mm``: slices with nodules are left out.
        ``seriesuid`` is a SeriesInstanceUID or the name of a file. Omitted: the ``annotations.csv`` beside
        the ``subset*`` folders of LUNA16, if an input is one.
    keep_lung : mapping, optional
        Case name to "right" or "left": only that lung is kept.
    names : sequence of str, optional
        Case names, one per CT found.
    series : str
        Of a DICOM folder with several series: "largest", "all", or a SeriesInstanceUID.
    lungs : str, optional
        How lungs are segmented where there are no `masks`; see `load_case`. Omitted: "network", or
        "classical" for the task lungs, whose network shall not be taught by itself.
    task : {"lesions", "lungs"}
        What shall be trained. For lungs the whole scan is kept on a coarse grid that follows the patient's
        size, with the right and the left lung told apart; `spacing` and `size` do not count, nodules stay,
        and `keep_lung` must be omitted.
    spacing : (3,) floats
        Working voxel size in mm, axis order z, y, x.
    size : int
        In-plane size in voxels; the lungs are centred, padded or cropped.
    overwrite : bool
        Prepare finished cases again.
    workers : int
        Processes that prepare a case each; the store is the same for any number. A script that asks for more
        than one must guard its main part by ``if __name__ == "__main__"``.
    report : callable, optional
        Called with each case's summary as it is done.

    Returns
    -------
    Summary
        Also in the store as ``summary.csv``, with the other cases there.

    Raises
    ------
    FileNotFoundError
        An input or `masks` does not exist.
    ValueError
        The call as a whole makes no sense: no inputs, a folder without CT, repeated or impossible case names,
        `masks` without a file for any case, names in `exclude` or `keep_lung` that are no case, annotations
        none of which belongs to an input,
        unreadable CSV, a store with other settings. What is wrong with one input is in the summary.
    ImportError
        `lungs` is "lungmask", which is not installed.
    """
    check_grid(spacing, size)  # before there is a store that is stuck with it
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    for_lungs = task == "lungs"
    if task not in OUTPUTS:
        raise ValueError(f"task must be one of {', '.join(OUTPUTS)}, got {task!r}")
    if for_lungs and (keep_lung or annotations is not None):
        given = "keep_lung" if keep_lung else "annotations"
        raise ValueError(f"{given} must be omitted for the task lungs: both are shown, with their nodules")
    if lungs is None:
        lungs = "classical" if for_lungs else "network"
    paths = [Path(given) for given in inputs]
    folder = None if masks is None else Path(masks)
    found = find_cases(paths, masks=folder, series=series, names=names, output=Path(output))
    cases = _by_name(found, names)
    sides = dict(keep_lung or {})
    left_out = read_exclusions(Path(exclude)) if exclude is not None else {}
    _check_names(list(cases), exclude=left_out, keep_lung=sides)
    check_lungs(found, lungs, label)
    files = [Path(annotations)] if annotations is not None else find_annotations(inputs)
    nodules = {} if for_lungs else match_annotations(files, list(cases.values()))
    kept = {"task": task} if for_lungs else {"spacing": [float(s) for s in spacing], "size": int(size)}
    store = Store.create(output, kept)
    refuse_foreign(store.path, ["summary.csv"], ours=is_summary(store.path / "summary.csv"), maker="a store")
    (store.path / "qc").mkdir(exist_ok=True)
    tasks = [
        Work(
            case=case,
            case_id=case_id,
            store=store.path,
            spacing=spacing,
            size=size,
            label=tuple(label),
            left_out=tuple(left_out.get(case_id, ())),
            nodules=tuple(nodules.get(case, ())),
            side=sides.get(case_id, "both"),
            lungs=lungs,
            task=task,
        )
        for case_id, case in cases.items()
    ]
    with claimed(store.path):
        store.clean()
        try:
            return Summary(_run(tasks, store, workers, overwrite, report), store, found.passed)
        finally:
            store.clean()  # what a worker left that was killed


def _by_name(found: Found[Case], names: Sequence[str] | None) -> dict[str, Case]:
    """CT by their names in the store."""
    for name in names or ():
        if name != case_name_for_store(name):
            raise ValueError(
                f"names must be of letters, digits and _.@+- and not start with a dot, got {name!r}"
            )
    cases = [case_name_for_store(case.case) for case in found]
    twice = sorted(name for name, count in Counter(cases).items() if count > 1)
    if twice:
        raise ValueError(f"case names must differ, got {', '.join(twice)} more than once; give names")
    return dict(zip(cases, found, strict=True))


def _check_names(cases: Sequence[str], **arguments: Mapping[str, object]) -> None:
    for argument, used in arguments.items():
        unknown = sorted(set(used) - set(cases))
        if unknown:
            raise ValueError(f"{argument} names {', '.join(unknown)}: no such case among {', '.join(cases)}")


def _run(
    tasks: Sequence[Work],
    store: Store,
    workers: int,
    overwrite: bool,
    report: Callable[[CaseSummary], None] | None,
) -> tuple[CaseSummary, ...]:
    """Prepare what is not there yet, and keep ``summary.csv`` up to date."""
    done: dict[str, CaseSummary] = {}
    if not overwrite:
        done = {work.case_id: there for work in tasks if (there := _there(work, store)) is not None}
    asked = {work.case_id for work in tasks}
    others = [CaseSummary.of(name, store[name].meta, "there") for name in store.case_ids if name not in asked]
    for case in done.values():
        if report is not None:
            report(case)
    for case in _prepared([work for work in tasks if work.case_id not in done], workers):
        done[case.case_id] = case
        if report is not None:
            report(case)
        _write_summary(store, [done[w.case_id] for w in tasks if w.case_id in done] + others)
    _write_summary(store, [done[work.case_id] for work in tasks] + others)
    return tuple(done[work.case_id] for work in tasks)


def _prepared(tasks: Sequence[Work], workers: int) -> Iterator[CaseSummary]:
    """Summaries in the order in which the cases end."""
    if workers == 1 or len(tasks) < 2:
        yield from map(attempt, tasks)
        return
    for index, result in run_parallel(attempt, tasks, min(workers, len(tasks))):
        if isinstance(result, Died):
            yield failed(tasks[index], f"{name_of(tasks[index].case.ct)}: {result}")
        else:
            yield result


def _there(work: Work, store: Store) -> CaseSummary | None:
    """Sum up a case that is finished; None where it is to be prepared."""
    if work.case_id not in store or not store[work.case_id].is_whole():
        return None
    meta = store[work.case_id].meta
    asked = {} if work.case.problem else work.request()  # of what cannot be read, what there is is kept
    other = [name for name, value in asked.items() if name in meta and meta[name] != value]
    remark = f"prepared with another {', '.join(other)}; overwrite prepares it again" if other else ""
    return CaseSummary.of(work.case_id, meta, "there", remark=remark)


def _write_summary(store: Store, cases: Sequence[CaseSummary]) -> None:
    try:
        write_csv(store.path / "summary.csv", cases)
    except OSError as error:  # a full disk: the cases are in the store or reported all the same
        warnings.warn(f"summary.csv could not be written: {error}", stacklevel=4)
