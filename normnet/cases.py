"""Which files form a case: a CT, its lungs, its annotated lesions; and the loop that segments one by one.

A case has the name of its CT without the format's suffix. In a folder of masks its file is ``p1.nii.gz``, or
the only one whose name begins with ``p1_``. A table names all files instead: ``cases.csv`` with the columns
case, ct, lungs, lesions, and paths relative to it.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from tqdm import tqdm

from lesionsynth import __version__
from lesionsynth.commands import printable
from lesionsynth.io import SUFFIXES, Found, Passed, Scan, Source, case_name, find_sources
from lesionsynth.strict import name_of, shown, some_of
from normnet.output import Record, Writer, check_output, read_record, stamp, to_write, write_case, write_table
from normnet.sheets import read_rows

COLUMNS = ("case", "ct", "lungs", "lesions")
"""Of a table of cases; the first two must be filled."""
K = TypeVar("K")
FORESEEN = (ValueError, OSError, MemoryError, ImportError)
"""Errors whose text says what is wrong with a file or a machine; of others the type is told, too."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one case; what is read of its CT is as in `lesionsynth.io.Source`."""

    case: str
    """Its name: results are called ``<case>_...``."""
    ct: Path
    series: str | None = None
    files: tuple[Path, ...] = field(default=(), compare=False, repr=False)
    lungs: Path | None = None
    """Mask of the lungs with the lesions in them, on the CT's grid."""
    lesions: Path | None = None
    """Mask of the annotated lesions, on the CT's grid."""
    more: Mapping[str, Path] = field(default_factory=dict, hash=False)
    """Further columns of a table."""
    problem: str = ""
    """Why the case cannot be worked on; empty where it can."""

    @property
    def inputs(self) -> list[Path]:
        """Every file that is read."""
        return [*self.files, *(p for p in (self.lungs, self.lesions, *self.more.values()) if p is not None)]


def find_cases(
    inputs: Sequence[Path],
    *,
    masks: Path | None = None,
    truth: Path | None = None,
    series: str = "largest",
    names: Sequence[str] | None = None,
    output: Path | None = None,
    columns: Sequence[str] = (),
) -> Found[Case]:
    """Find the files of every case.

    Parameters
    ----------
    inputs : sequence of Path
        CT as in `lesionsynth.io.find_sources`; or one ``.csv``, see `read_table`, which names everything.
    masks, truth : Path, optional
        Folders with the lungs and the annotated lesions, see `match`.
    series, names, output
        As in `find_sources`.
    columns : sequence of str
        What a table may have beside `COLUMNS`.

    Returns
    -------
    Found of Case
        One without its masks has a `problem`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `find_sources`, `match` and `read_table`; or `masks`, `truth` or `names` are given beside a table.
    """
    tables = [path for path in inputs if path.suffix.lower() == ".csv"]
    if tables:
        given = {"inputs": inputs[1:], "masks": masks, "truth": truth, "names": names}
        if wrong := [name for name, value in given.items() if value]:
            raise ValueError(f"{wrong[0]} must be omitted beside a table of cases, {name_of(tables[0])}")
        return Found(read_table(tables[0], series=series, columns=columns))
    sources = find_sources(inputs, series=series, names=names, output=output)
    cases = [
        Case(case=source.case, ct=source.path, series=source.series, files=source.files) for source in sources
    ]
    return Found(with_masks(cases, masks, truth), sources.passed)


def with_masks(cases: Sequence[Case], masks: Path | None, truth: Path | None) -> list[Case]:
    """Add to cases their lungs and annotated lesions out of folders, as `find_cases` does; or a problem."""
    found = list(cases)
    for argument, role, folder in (("masks", "lungs", masks), ("truth", "lesions", truth)):
        if folder is None:
            continue
        files, problems = match(folder, cases, argument)
        for number, case in enumerate(found):
            own: dict[str, Any] = {role: files.get(case.case)}
            found[number] = replace(case, problem=case.problem or problems.get(case.case, ""), **own)
    return found


def match(folder: Path, cases: Sequence[Case], argument: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Find the file of each case in a folder: ``<case>.nii.gz``, else the only one of ``<case>_*``.

    Parameters
    ----------
    folder : Path
        Not searched deeper; or a file, for a single case. A file whose name begins with those of two cases is
        of the longer one; a CT of a case is no mask.
    cases : sequence of Case
    argument : str
        What named the folder, for messages.

    Returns
    -------
    files, problems : dict of str to Path, and to str
        The file of each case, or why it has none.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    ValueError
        It is a file for several cases, or holds a file for none of them.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{argument} must exist, got {folder}: no such file or folder")
    if not folder.is_dir():
        if len(cases) > 1:
            raise ValueError(f"{argument} must be a folder where there are several CT, got the file {folder}")
        return {cases[0].case: folder}, {}
    ct = {path.resolve() for case in cases for path in case.files}
    there = [
        path
        for path in sorted(folder.iterdir())
        if path.name.lower().endswith(SUFFIXES) and path.name[0] != "." and path.resolve() not in ct
    ]
    fits: dict[str, list[Path]] = defaultdict(list)
    for path in there:
        name = case_name(path)
        if owners := [c.case for c in cases if name == c.case or name.startswith(f"{c.case}_")]:
            fits[max(owners, key=len)].append(path)
    files, problems = {}, {}
    for case in (c.case for c in cases):
        found = [path for path in fits[case] if case_name(path) == case] or fits[case]
        if len(found) == 1:
            files[case] = found[0]
            continue
        listed = some_of(", ", [name_of(path.name) for path in found or there])
        rule = f"{argument} must hold {case}.nii.gz, or one file of {case}_*.nii.gz"
        problems[case] = f"{rule}, got {listed or 'no file of a format that is read'} in {name_of(folder)}"
    if not files:
        raise ValueError(next(iter(problems.values())))
    return files, problems


def read_table(
    path: Path, *, series: str = "largest", columns: Sequence[str] = (), needed: Sequence[str] = ()
) -> list[Case]:
    """Read a table of cases: a CSV with the columns `COLUMNS`.

    Parameters
    ----------
    path : Path
        In UTF-8. Paths in it are relative to its folder.
    series, columns
        As in `find_cases`.
    needed : sequence of str
        Columns that must be filled, beside case and ct.

    Returns
    -------
    list of Case
        One whose files do not exist has a `problem`.

    Raises
    ------
    OSError, ValueError
        It cannot be read or is no CSV; a column is unknown, a needed cell empty, or a case there twice.
    """
    known, name = (*COLUMNS, *columns), name_of(path)
    rows = [(line, cells) for line, cells in read_rows(path) if any(cells)]
    if len(rows) < 2:
        raise ValueError(f"{name} must have at least one row below its header")
    header = rows[0][1]
    if unfit := [cell for n, cell in enumerate(header) if cell not in known or cell in header[:n]]:
        raise ValueError(f"{name}: columns must be among {', '.join(known)}, got {shown(unfit[0])}")
    cases: dict[str, Case] = {}
    for line, cells in rows[1:]:
        if any(cells[len(header) :]):
            raise ValueError(f"{name}, line {line}: must have {len(header)} cells, got {len(cells)}")
        row = dict(zip(header, cells, strict=False))
        if lacking := [column for column in ("case", "ct", *needed) if not row.get(column)]:
            raise ValueError(f"{name}, line {line}: {lacking[0]} must be filled, got none")
        if row["case"] in cases:
            raise ValueError(f"{name}, line {line}: cases must differ, got {shown(row['case'])} twice")
        files = {column: path.parent / cell for column, cell in row.items() if column != "case" and cell}
        cases[row["case"]] = _of_row(row["case"], files, series)
    return list(cases.values())


def _of_row(case: str, files: dict[str, Path], series: str) -> Case:
    """Make the case of a row; what is wrong with its files is told where it is worked on."""
    more = {name: path for name, path in files.items() if name not in COLUMNS}
    made = Case(case=case, ct=files["ct"], lungs=files.get("lungs"), lesions=files.get("lesions"), more=more)
    try:
        with hear():  # what a folder holds beside the CT is no news
            sources = find_sources([made.ct], series=series)
        if len(sources) != 1:
            raise ValueError(f"ct must be one CT, got {len(sources)} in {name_of(made.ct)}")
        made = replace(made, ct=sources[0].path, series=sources[0].series, files=sources[0].files)
        if lost := [path for path in made.inputs if not path.exists()]:
            raise FileNotFoundError(f"{name_of(lost[0])}: no such file or folder")
    except (OSError, ValueError) as error:
        return replace(made, problem=reason(None, error))
    return made


@dataclass(frozen=True)
class Place:
    """Where a CT that was read before is now: what `lesionsynth.io.read_ct` takes."""

    path: Path
    series: str | None
    hint: str = ""
    """What to say where nothing is there."""


def locate(records: Sequence[Mapping[str, Any]], inputs: Sequence[Path]) -> Found[Place]:
    """Tell where the CT of finished cases are now.

    Parameters
    ----------
    records : sequence of mapping
        From `normnet.output.read_record`.
    inputs : sequence of Path
        Files and folders with CT that may have moved. A series is known by its UID; a file by its name, where
        several have it by the folders above, else by the name of its case. A file that would fit two cases
        equally well is taken for neither.

    Returns
    -------
    Found of Place
        One per record; the recorded place where `inputs` holds nothing that fits.

    Raises
    ------
    FileNotFoundError, ValueError
        As `lesionsynth.io.find_sources`.
    """
    sources = _every_ct(inputs) if inputs else Found[Source]()
    hint = f"nothing in ct fits either{sources.over}" if inputs else "ct must name its new place"
    places = [Place(Path(r["ct"]), r["series"], hint) for r in records]
    claims: dict[Path, dict[int, int]] = defaultdict(dict)
    for number, record in enumerate(records):
        same = [source for source in sources if source.series and source.series == record["series"]]
        if same:
            places[number] = Place(same[0].path, record["series"])
            continue
        fits = {source.path: _fit(source, record) for source in sources}
        best = _largest(fits)
        if len(best) == 1:
            claims[best[0]][number] = fits[best[0]]
        elif best:
            hint = f"{name_of(best[0])} and {name_of(best[1])} fit equally well"
            places[number] = replace(places[number], hint=hint)
    for path, claim in claims.items():
        first = _largest(claim)
        hint = f"{name_of(path)} fits {' and '.join(records[n]['case'] for n in first)} equally well"
        for number in first:
            places[number] = Place(path, None) if len(first) == 1 else replace(places[number], hint=hint)
    return Found(places, sources.passed)


def _largest(fits: Mapping[K, int]) -> list[K]:
    """Return what fits best, several where they do equally; nothing where nothing fits."""
    return [key for key, fit in fits.items() if fit and fit == max(fits.values())]


def _every_ct(inputs: Sequence[Path]) -> Found[Source]:
    try:
        with hear():  # that localizers are left out is no news: series are looked up by UID
            return find_sources(list(dict.fromkeys(inputs)), series="all", case_of=os.fspath)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"ct must exist, got {error}") from None
    except ValueError as error:
        raise ValueError(f"ct must name CT volumes or DICOM series, got {error}") from error


def _fit(source: Source, record: Mapping[str, Any]) -> int:
    """How well a file fits a record: one and the names its path ends in like the recorded; 0 for another."""
    if source.series is not None:
        return 0
    # the recorded path may be of another system; this class splits at both kinds of slashes
    there, here = PureWindowsPath(record["ct"]).parts, source.path.resolve().parts
    same = 0
    while same < min(len(there), len(here)) and there[-1 - same] == here[-1 - same]:
        same += 1
    return same + 1 if same else int(case_name(source.path) == record["case"])


# ---- one case after the other


@dataclass(frozen=True, kw_only=True)
class CaseArgs:
    """What commands take that segment cases."""

    output: Path
    """Folder for the results."""
    series: str = "largest"
    """DICOM series to read: the "largest" of a folder, "all", or a SeriesInstanceUID."""
    masks: Path | None = None
    """Folder with lung masks, <case>.nii.gz or the only <case>_*.nii.gz; or the mask of a single CT. The
    lungs are segmented where omitted."""
    label: tuple[int, ...] = ()
    """Labels of the masks that are lung; all above zero where omitted."""
    lungs: str = "network"
    """How lungs are segmented: network, that of this package; classical, thresholds and morphology; lungmask,
    the network of that package, if installed; or weights of your own (normnet.train --task lungs)."""
    overwrite: bool = False
    """Replace results of other settings, models, CTs or methods, and whatever else has their names."""
    device: str = "auto"
    """"auto" takes CUDA where there is some, else the CPU."""
    threads: int | None = None
    """CPU threads; all cores where omitted."""


@dataclass(frozen=True, eq=False)
class Segmented:
    """What a method found in a CT."""

    ct: Scan
    """What it was given."""
    writers: Mapping[str, Writer]
    """What writes each file, by kind of `normnet.output.FILES`."""
    volumes: Mapping[str, float | None]
    """See `normnet.output.volumes_of`."""
    inflation: float = 1.0
    """What HU in the lungs were multiplied with, see `normnet.inflation`."""


@dataclass(frozen=True)
class PredictSummary:
    """What became of the cases of a call."""

    written: list[str]
    """Segmented now."""
    there: list[str]
    """Finished by an earlier call with the same settings."""
    failures: dict[str, str]
    """Why the others failed, or why cases that have their maps have no DICOM Segmentation."""
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What was warned of, by case."""
    passed: tuple[Passed, ...] = ()
    """What lay in the inputs and was not taken for a CT."""

    def tell(self, program: str, output: Path) -> int:
        """Print it at a command's end, and return the exit status."""
        done, there = {*self.written, *self.there}, len(self.there)
        earlier = f" ({there} by an earlier call)" if there else ""
        count = len(done | self.failures.keys())
        print(f"{len(done)} of {count} volumes segmented{earlier}, in {name_of(output)}", flush=True)
        named = tell(self.warnings, self.passed)
        for said in self.failures.values():
            print(f"{program}: {said}", file=sys.stderr)
        return 1 if self.failures or named else 0


def run_cases(
    cases: Found[Case],
    args: CaseArgs,
    lungs: Record,
    request: Record,
    kinds: Callable[[Case], Sequence[str]],
    segment: Callable[[Case, Sequence[str]], Segmented],
    *,
    progress_bar: bool = False,
) -> PredictSummary:
    """Segment cases and write what was found; one that fails does not stop the others.

    Parameters
    ----------
    cases : Found of Case
    args : CaseArgs
        Where to, and what else a record tells.
    lungs : mapping
        The method for cases without a mask: ``lungs_from``, ``lungs_sha256``.
    request : mapping
        What makes results those of this call, beside the inputs: ``settings``, ``models``.
    kinds : callable
        Files that a case shall have, of `normnet.output.FILES`.
    segment : callable
        Given a case and the kinds to write.
    progress_bar : bool

    Raises
    ------
    ValueError
        As `normnet.output.check_output` and `normnet.output.to_write`. Nothing is written.
    """
    requests: dict[str, Record] = {}
    failures: dict[str, str] = {}
    for case in cases:
        try:
            if case.problem:
                raise ValueError(case.problem)
            requests[case.case] = _inputs(case, args.label, lungs) | request
        except (ValueError, OSError) as error:
            failures[case.case] = reason(case.ct, error)
    good = [case for case in cases if case.case in requests]
    check_output(args.output, {case.case: case.inputs for case in good}, overwrite=args.overwrite)
    wanted: dict[str, Sequence[str]] = {}
    for case in good:
        name = case.case
        wanted[name] = to_write(args.output, name, requests[name], kinds(case), overwrite=args.overwrite)
    there = [name for name, files in wanted.items() if not files]
    said = {name: list(read_record(args.output / f"{name}.json")["warnings"]) for name in there}
    written: list[str] = []

    def work(case: Case) -> None:  # what it holds of a case is let go before the next
        start = time.perf_counter()
        with hear() as said[case.case]:
            found = segment(case, wanted[case.case])
        record = {
            "case": case.case,
            **requests[case.case],
            "grid": {"shape": list(found.ct.hu.shape), "spacing": [float(s) for s in found.ct.spacing]},
            "volumes": found.volumes,
            "inflation": found.inflation,
            "version": __version__,
            "seconds": round(time.perf_counter() - start, 2),
            "warnings": said[case.case],
        }
        write_case(args.output, case.case, found.writers, record, overwrite=args.overwrite)

    try:
        todo = [case for case in good if wanted[case.case]]
        for case in tqdm(todo, disable=not progress_bar, unit="case", desc="predict"):
            try:
                work(case)
                written.append(case.case)
            except Exception as error:  # one failing case must not stop the batch
                failures[case.case] = reason(case.ct, error)
    finally:
        if args.output.is_dir():
            write_table(args.output)
    return PredictSummary(written, there, failures, said, cases.passed)


def _inputs(case: Case, label: Sequence[int], lungs: Record) -> Record:
    """Tell what a case is read from, before it is read: what changes meanwhile is seen the next time."""
    if case.lungs:
        lungs = {"lungs_from": os.path.abspath(case.lungs), "lungs_sha256": None}
    return {
        "ct": os.path.abspath(case.ct),
        "series": case.series,
        **lungs,
        "label": list(label) or None,
        "ct_stamp": stamp(case.files),
        "lungs_stamp": stamp([case.lungs]) if case.lungs else None,
    }


# ---- what is said about a case


def reason(path: Path | None, error: Exception) -> str:
    """Say on one line which file, where one is given, and what is wrong with it."""
    text = str(error)
    said = text if isinstance(error, FORESEEN) and text else f"{type(error).__name__}: {text}"
    # what is no text is escaped: it goes to terminals and tables
    if path is None:
        return name_of(said)
    name = name_of(path)
    said = name_of(said.replace(str(path), name))
    return said if name in said else f"{name}: {said}"


@contextmanager
def hear() -> Iterator[list[str]]:
    """Collect the warnings of a case, each text once; the list is full when the block ends."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
        try:
            yield texts
        finally:
            ours = [one for one in caught if issubclass(one.category, UserWarning)]
            texts += dict.fromkeys(str(one.message) for one in ours)
    for one in caught:
        if one not in ours:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def tell(said: Mapping[str, Sequence[str]], passed: Sequence[Passed] = ()) -> bool:
    """Print on standard error, at a command's end, the warnings by case and what was passed over.

    Returns
    -------
    bool
        The user named something that was passed over: the exit status is 1.
    """
    for case, texts in said.items():
        for text in texts:
            print(printable(f"warning: {case}: {text}"), file=sys.stderr)
    if passed:
        over = [printable(f"passed over: {one}") for one in sorted(passed, key=lambda one: not one.named)]
        print(some_of("\n", over), file=sys.stderr)
    return any(one.named for one in passed)
