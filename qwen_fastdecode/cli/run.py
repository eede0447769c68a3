"""`qwen-fastdecode run`: a program that is not edited, patched when it imports a model of Transformers.

Neither torch nor Transformers is imported before the program does it. It runs as `python` would run it: not through
`runpy`, which takes the `__main__` module away when its body ends, while threads, functions registered with `atexit`
and processes that multiprocessing spawns still look for it.
"""

from __future__ import annotations

import argparse
import builtins
import importlib.util
import os
import pkgutil
import sys
from importlib.machinery import ModuleSpec, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any

from ..errors import PatchError
from ..layer import install
from .arguments import Exit
from .run_checks import refusal
from .run_report import Report


class NotFound(Exception):
    """There is no such program; message and exit code are python's."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


def run(args: argparse.Namespace) -> int:
    """Runs the program to its end. What it raises comes through, without this package's frames in the traceback."""
    if not args.program:
        args.parser.error("expected a SCRIPT, or -m and a MODULE")
    why_not = refusal(args.backend, strict=args.strict)
    if why_not is not None:
        args.parser.exit(Exit.BAD_INPUT, f"{args.parser.prog}: {why_not}\n")
    name, *arguments = args.program
    report = Report()
    refused = patch_imports(
        args.backend,
        strict=args.strict,
        keep=args.report,
        report=report,
        cuda_graph=args.cuda_graph,
        deferred_state=args.deferred_state,
    )
    if args.report:
        report.at_exit()
    try:
        sys.argv = ["-m" if args.module else name, *arguments]
        main, code = load_module(name) if args.module else load_script(name)
        sys.modules["__main__"] = main
        vars(main)["__builtins__"] = builtins  # exec alone would put its dict there
        exec(code, vars(main))
    except NotFound as error:
        args.parser.exit(error.exit_code, f"{args.parser.prog}: {error}\n")
    except BaseException as error:
        hide_our_frames(error)
        raise
    return Exit.BAD_INPUT if refused else Exit.RIGHT  # a thread that was refused ended in silence


def patch_imports(
    backend: str, *, strict: bool, keep: bool, report: Report, cuda_graph: bool = False, deferred_state: bool = False
) -> list[PatchError]:
    """Has every supported family patched as soon as the program has imported it, and not earlier.

    Where one cannot be, says so in one line and ends the program. Returns a list to which such refusals are added.
    """
    refused: list[PatchError] = []

    def families(_: ModuleType) -> None:
        from ..upstream.seams import load_seams  # imports Transformers, which now is there

        for module in sorted({seam.module for seam in load_seams()}):
            install.on_import(module, patch)

    def patch(module: ModuleType) -> None:
        from ..layer.everything import patch_imported  # imports torch, which now is there

        try:
            patch_imported(
                module.__name__,
                backend=backend,
                strict=strict,
                keep=keep,
                cuda_graph=cuda_graph,
                deferred_state=deferred_state,
            )
        except PatchError as error:
            if str(error) not in map(str, refused):
                print(f"qwen-fastdecode run: {' '.join(str(error).split())}", file=sys.stderr)
            refused.append(error)
            # Transformers would turn an Exception into a ModuleNotFoundError.
            raise SystemExit(int(Exit.BAD_INPUT)) from error
        if cuda_graph:
            from .. import graph

            graph.refresh()
        report.refused += refusals(module.__name__)

    install.on_import("transformers", families)
    return refused


def refusals(module: str) -> list[str]:
    """Why classes of an imported module are left to Transformers."""
    from ..layer.review import review
    from ..upstream.seams import upstream_classes

    ours = [x for x in upstream_classes(import_missing=False) if x.layer_class.__module__ == module]
    return [f"{x.label} stays with upstream: {error}." for x in ours if (error := review(x).error) is not None]


def load_script(path: str) -> tuple[ModuleType, CodeType]:
    """The `__main__` of a file of source or bytecode, or of a folder or zip that has one."""
    file = os.path.abspath(path)
    container = pkgutil.get_importer(file)
    if container is not None:
        set_first_path(file, always=True)
        spec = container.find_spec("__main__")
        if spec is None:
            raise NotFound(f"can't find '__main__' module in {path!r}")
        return _load(spec)
    set_first_path(os.path.dirname(os.path.realpath(path)))
    loader: SourcelessFileLoader | SourceFileLoader
    try:
        if path.endswith(".pyc"):
            loader = SourcelessFileLoader("__main__", file)
            code = _code(loader, "__main__")
        else:
            loader = SourceFileLoader("__main__", file)
            code = loader.source_to_code(loader.get_data(file), file)  # get_code would leave a .pyc beside the script
    except OSError as error:
        raise NotFound(f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}", exit_code=2) from error
    main = ModuleType("__main__")
    vars(main).update(__file__=file, __loader__=loader, __cached__=None)
    return main, code


def load_module(name: str) -> tuple[ModuleType, CodeType]:
    """The `__main__` of a module, or of a package that has one."""
    set_first_path(os.getcwd())
    spec = _find(name)
    if spec.submodule_search_locations is not None:
        spec = _find(f"{name}.__main__")
    main, code = _load(spec)
    sys.argv[0] = str(main.__file__)  # until here it is "-m": packages around the module see that as they are imported
    return main, code


def set_first_path(entry: str, *, always: bool = False) -> None:
    """Puts `entry` where python puts the program's folder; with -P it puts none there, except that of a `__main__`."""
    safe = getattr(sys.flags, "safe_path", False)  # from Python 3.11 on
    if not safe:
        del sys.path[0]  # what python put there for this command
    if always or not safe:
        sys.path.insert(0, entry)


def _find(name: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package around the module could not import something
        spec = None
    if spec is None:
        raise NotFound(f"No module named {name}")
    return spec


def _load(spec: ModuleSpec) -> tuple[ModuleType, CodeType]:
    code = _code(spec.loader, spec.name)
    main = importlib.util.module_from_spec(spec)
    main.__name__ = "__main__"
    return main, code


def _code(loader: Any, name: str) -> CodeType:
    code = loader.get_code(name) if hasattr(loader, "get_code") else None
    if code is None:
        raise NotFound(f"No code object available for {name}")
    return code


def hide_our_frames(error: BaseException) -> None:
    """Has python print the traceback from the program's first frame on, through the program's own hook if it set one.

    The exception itself must go on to the top: an interrupted process ends by the signal, not by an exit code.
    """
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((__file__, "<frozen ")):
        frames = frames.tb_next
    show = sys.excepthook

    def show_theirs(kind: type[BaseException], value: BaseException, _: TracebackType | None) -> None:
        show(kind, value.with_traceback(frames), frames)

    sys.excepthook = show_theirs
