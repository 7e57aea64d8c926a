"""examples/serving: the manifest fits Kubernetes' schema, times add up, and the words are the command's."""

import configparser
import tomllib

import kubernetes_validate
import pytest
import yaml

from fanformer.cli.serve import serve


@pytest.fixture(scope="module")
def objects(repository):
    text = (repository / "examples/serving/kubernetes.yaml").read_text(encoding="utf-8")
    return {found["kind"]: found for found in yaml.safe_load_all(text)}


def test_every_object_fits_the_schema(objects):
    assert set(objects) == {"Deployment", "Service", "PodDisruptionBudget"}
    for found in objects.values():
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


def test_a_wrong_field_would_be_found(objects):
    wrong = {**objects["Service"], "spec": {**objects["Service"]["spec"], "prots": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_a_pod_is_given_longer_than_it_needs_to_leave(objects):
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    options = dict(word.removeprefix("--").split("=") for word in container["args"] if word.startswith("--"))
    leaving = container["lifecycle"]["preStop"]["sleep"]["seconds"] + float(options["drain-seconds"])
    assert leaving < pod["terminationGracePeriodSeconds"]


def test_the_arguments_are_those_of_the_command(objects):
    [container] = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    with serve.make_context("serve", list(container["args"])) as context:
        assert context.params["models"] == ("/models/assistant",)
        assert context.params["port"] == container["ports"][0]["containerPort"]
        assert context.params["api_key_file"].startswith("/keys/")


def test_the_labels_select_the_pods(objects):
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"] == labels
    assert objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_the_unit_stops_in_time_and_its_words_are_those_of_the_command(repository):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string((repository / "examples/serving/fanformer.service").read_text(encoding="utf-8"))
    program, verb, *words = unit["Service"]["ExecStart"].split()
    assert (program.rpartition("/")[2], verb) == ("fanformer", "serve")
    with serve.make_context("serve", words) as context:
        assert context.params["models"] == ("/opt/fanformer/models/assistant",)
        assert context.params["drain_seconds"] < float(unit["Service"]["TimeoutStopSec"])
        name = context.params["api_key_file"].rpartition("/")[2]
    assert unit["Service"]["LoadCredential"].startswith(f"{name}:")


def test_the_image_holds_what_is_installed_and_nothing_else_of_the_folder(repository):
    lines = (repository / "examples/serving/Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    assert copied == {"src", "pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert all((repository / name).exists() for name in copied)
