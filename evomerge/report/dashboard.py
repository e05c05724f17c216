"""`evomerge dashboard`: optuna-dashboard over the study of a run, on this machine only.

The dashboard can rename and delete studies, add trials and write notes.  So it gets a copy of the study in memory,
which follows the study while a search runs, and the run's database is only read: nothing that happens in the dashboard
reaches it, and no search or resume notices.  The copy has the same trials, parameters and values; instead of the
record of a trial it has what a reader wants of it, and the notes, plots and files of the run are attached to it.
"""

import copy
import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial

from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.printable import say
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.monitor.incumbent import means
from evomerge.search.run import Run
from evomerge.search.storage.optuna_private import key_of_study
from evomerge.search.storage.study import in_full, rank
from evomerge.search.storage.trial_record import LEARNED, record_of

FOLLOW = 5.0  # seconds between two looks at the study
HOST = "127.0.0.1"
MISSING = 'the dashboard is not installed; pip install "evomerge[dashboard]"'
TYPES = {".html": "text/html", ".json": "application/json", ".yaml": "text/plain"}
FILES = ("report.html", "recommended.yaml", "winner.yaml", "verdict.json")  # of the run folder, without secrets


@dataclass(frozen=True)
class Plot:
    """A figure as Plotly's JavaScript reads it; `save_plotly_graph_object` asks for no more than this."""

    content: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.content)


class StudyCopy:
    """A study in memory that follows another one.

    source: only read.
    config: of the search.
    """

    def __init__(self, source: optuna.Study, config: SearchConfig) -> None:
        self.source = source
        self.storage = InMemoryStorage()
        self.study = optuna.create_study(
            study_name=source.study_name, storage=self.storage, directions=source.directions
        )
        self.study.set_user_attr("method", config.method)
        self.study.set_user_attr("sources", ", ".join(s.name for s in config.sources))
        self.study.set_user_attr("sampler", config.sampler.name)
        self.study.set_user_attr("seed", config.seed)
        self.keys: list[int] = []  # of the trials of the copy, by number
        self.unfinished: set[int] = set()

    def follow(self) -> bool:
        """Take over what is new; returns whether anything was."""
        changed = False
        for trial in self.source.get_trials(deepcopy=False):  # by number
            if trial.number == len(self.keys):
                self.keys.append(self.storage.create_new_trial(key_of_study(self.study), without_record(trial)))
                if not trial.state.is_finished():
                    self.unfinished.add(trial.number)
                changed = True
            elif trial.number in self.unfinished and trial.state.is_finished():
                key = self.keys[trial.number]
                for name, value in described(trial).items():
                    self.storage.set_trial_user_attr(key, name, value)
                self.storage.set_trial_state_values(key, trial.state, trial.values)
                self.unfinished.discard(trial.number)
                changed = True
        return changed

    def trial(self, number: int) -> optuna.Trial:
        """A trial of the copy, to attach something to."""
        return optuna.Trial(self.study, self.keys[number])


def without_record(trial: FrozenTrial) -> FrozenTrial:
    """A trial with what a reader wants instead of its record."""
    found = copy.copy(trial)
    found.user_attrs = described(trial)
    found.system_attrs = {}
    return found


def described(trial: FrozenTrial) -> dict[str, Any]:
    """What a reader wants to know of a trial: what it is, how it ended, its mean scores, its seconds."""
    record = record_of(trial)
    found: dict[str, Any] = {}
    if "baseline" in trial.user_attrs:
        found["baseline"] = str(trial.user_attrs["baseline"])
    if LEARNED in trial.user_attrs:
        found["gradient steps"] = trial.user_attrs[LEARNED]
    if record.partial is not None:
        found["stopped after"] = f"{record.partial:.0%} of the items"
    if record.failure is not None:
        found["broken" if record.broken else "failed"] = record.failure
    if in_full(trial):
        found |= {f"{task} {metric}": round(mean, 6) for (task, metric), mean in means(record.scores).items()}
    if record.seconds.total is not None:
        found["seconds"] = round(record.seconds.total, 3)
    return found


class Dashboard:
    """The copy of a run's study with its notes, plots and files, and the application that shows them.

    folder: gets copies of the run's files.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        from optuna_dashboard import wsgi

        self.run = run
        self.copy = StudyCopy(run.study(), run.config())
        self.store = FileSystemArtifactStore(str(folder))
        self.attached: dict[str, tuple[tuple[int, int], str]] = {}  # name -> stamp of the file, id of the artifact
        self.noted = ""
        self.lock = threading.Lock()
        self.update()
        self.application: Callable[..., Iterable[bytes]] = local_only(wsgi(self.copy.storage, self.store))

    def update(self) -> None:
        """Take over what is new in the study and in the run folder."""
        with self.lock:
            if self.copy.follow():
                self.draw()
            self.attach()
            self.note()

    def draw(self) -> None:
        """The scores by task, trial by trial."""
        from optuna_dashboard import save_plotly_graph_object

        attributes = self.copy.source.user_attrs
        if SCALE not in attributes:
            return
        scale = Scale.from_json(attributes[SCALE])
        trials = [t for t in self.copy.source.get_trials(deepcopy=False) if in_full(t)]
        traces = []
        for task, line in scale.tasks.items():
            scores = [means(record_of(t).scores).get((task, line.objective.name)) for t in trials]
            each = [None if s is None else float(line.objective.of([s])[0]) for s in scores]
            numbers = [t.number for t in trials]
            traces.append({"type": "scatter", "mode": "lines+markers", "name": task, "x": numbers, "y": each})
        layout = {
            "title": {"text": "Objective by task (0: base, 1: best parent), trials scored on all items"},
            "xaxis": {"title": {"text": "trial"}},
        }
        plot: Any = Plot({"data": traces, "layout": layout})
        save_plotly_graph_object(self.copy.study, plot, graph_object_id="tasks")

    def attach(self) -> None:
        """Attach the run's files; one that has changed takes the place of its former content."""
        for name in FILES:
            file = self.run.folder / name
            try:
                stamp = (file.stat().st_size, file.stat().st_mtime_ns)
            except OSError:
                continue
            before = self.attached.get(name)
            if before is not None and before[0] == stamp:
                continue
            kind = TYPES[file.suffix]
            key = upload_artifact(
                artifact_store=self.store, file_path=str(file), study_or_trial=self.copy.study, mimetype=kind
            )
            self.attached[name] = stamp, key
            if before is not None:
                self.copy.storage.set_study_system_attr(key_of_study(self.copy.study), f"artifacts:{before[1]}", "null")
                self.store.remove(before[1])

    def note(self) -> None:
        """The verdict as the study's note, and what the best trial is."""
        from optuna_dashboard import save_note

        verdict = self.run.verdict()
        text = f"# {self.copy.study.study_name}\n\n" + (
            "The search has no verdict yet." if verdict is None else f"**{verdict['sentence']}**"
        )
        best = max(filter(in_full, self.copy.source.get_trials(deepcopy=False)), key=rank, default=None)
        if best is not None:
            text += f"\n\nBest on the search items: trial {best.number}, {best.value:.4f}."
        text += (
            f"\n\nRun folder: `{self.run.folder}`. What is written or deleted here changes only this copy of the "
            "study.\n\n    " + f"evomerge export {self.run.folder} --out merged/\n"
        )
        if text == self.noted:
            return
        save_note(self.copy.study, text)
        self.noted = text
        chosen = None if verdict is None else verdict["chosen"].get("trial")
        if chosen is not None and chosen < len(self.copy.keys):
            save_note(self.copy.trial(chosen), "The candidate of the verdict.")


def local_only(application: Any) -> Any:
    """The application for those who ask for this machine by its name: a page of another site cannot pretend to."""

    def guarded(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        name = str(environ.get("HTTP_HOST", "")).rpartition(":")[0] or str(environ.get("HTTP_HOST", ""))
        if name not in (HOST, "localhost"):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"this dashboard answers only as 127.0.0.1 or localhost\n"]
        found: Iterable[bytes] = application(environ, start_response)
        return found

    return guarded


class Server(ThreadingMixIn, WSGIServer):
    """Answers several requests at a time; those that are open do not keep it from ending."""

    daemon_threads = True


class Quiet(WSGIRequestHandler):
    """A handler that prints no line for each request."""

    def log_message(self, format: str, *args: Any) -> None: ...


def serve(run: Run, port: int, ready: Callable[[str], None]) -> None:
    """Show a run's study until Ctrl-C.

    port: of 127.0.0.1; 0 for any that is free.
    ready: told the address.

    EvomergeError if the dashboard is not installed, there is no study, or the port is taken.
    """
    try:
        import optuna_dashboard  # noqa: F401
    except ImportError:
        raise EvomergeError(MISSING) from None
    with tempfile.TemporaryDirectory(prefix="evomerge-dashboard-") as folder:
        dashboard = Dashboard(run, Path(folder))
        try:
            server = make_server(HOST, port, dashboard.application, Server, Quiet)
        except OSError as error:
            raise EvomergeError(f"port {port} of {HOST}: {error.strerror}; give another one with --port") from None
        ended = threading.Event()
        threading.Thread(target=keep_following, args=(dashboard, ended), daemon=True).start()
        ready(f"http://{HOST}:{server.server_port}/dashboard")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            ended.set()
            server.server_close()


def keep_following(dashboard: Dashboard, ended: threading.Event) -> None:
    """Update the copy every few seconds; a database that does not answer is asked again."""
    while not ended.wait(FOLLOW):
        try:
            dashboard.update()
        except Exception as error:
            say(f"note: the study cannot be read now ({type(error).__name__})")
