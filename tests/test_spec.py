"""Settings files: what is right is read, what is wrong is told with what would be right."""

import pytest

from mmimpute.errors import UserError
from mmimpute.spec import CohortSpec, ImputeSettings, ModalitySpec, read_config, read_spec

MODALITY = '[modalities.labs]\nprefix = "labs__"\n'
WRONG = {
    "unknown key": ("colour = 1\n" + MODALITY, "unknown key 'colour'; valid keys here: subject_id, timestamp, outcomes, subgroups"),
    "unknown key inside": (MODALITY + "hidden = 1\n", "unknown key 'modalities.labs.hidden'; valid keys here: column, prefix, features"),
    "no modality": ('subject_id = "id"\n', "modalities: Field required"),
    "unknown kind": (MODALITY + 'kinds = "number"\n', "modalities.labs.kinds"),
    "both places": (MODALITY + 'column = "labs"\n', "give either column"),
    "no place": ("[modalities.labs]\nimpute = false\n", "give either column"),
    "kinds and features differ": (MODALITY + 'features = ["a"]\nkinds = ["real", "real"]\n', "2 kinds for 1 features"),
    "repeated features": (MODALITY + 'features = ["a", "a"]\n', "not unique"),
    "never hidden": (MODALITY + "hide = 0.0\n", "modalities.labs.hide"),
    "unknown tails": (MODALITY + 'tails = "heavy"\n', "modalities.labs.tails: Input should be 'gaussian' or 'student'"),
    "unknown decoder": (MODALITY + 'decoder = "gan"\n', "labs.decoder: Input should be 'likelihood', 'adversarial' or 'diffusion'"),
    "name with a divider": ('[modalities."a__b"]\nprefix = "a__"\n', "has no '__' in it"),
    "contrast on nothing": (MODALITY + '[contrastive]\nlabels = {a = 1}\non = "rna"\n', "contrastive.on names 'rna'; valid are z0 and"),
    "contrast by nothing": (MODALITY + "[contrastive]\nlabels = {}\n", "contrastive.labels"),
    "contrast of no weight": (MODALITY + "[contrastive]\nlabels = {a = 0}\n", "contrastive.labels.a.weight"),
    "unknown key of a label": (MODALITY + "[contrastive.labels.a]\nbin = 3\n", "contrastive.labels.a"),
    "no TOML": ("subject_id = \n", "not a readable TOML file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_told(case, tmp_path):
    text, message = WRONG[case]
    path = tmp_path / "cohort.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_spec(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_spec(tmp_path / "cohort.toml")


def test_spec_round_trip(spec_file):
    spec = read_spec(spec_file)
    assert list(spec.modalities) == ["labs", "rna", "dx"]
    assert CohortSpec.model_validate_json(spec.model_dump_json()) == spec


def test_config_takes_the_spec_as_a_path_or_as_a_table(spec_file, tmp_path):
    places = 'shards = "a"\nmodel = "b"\noutput = "c"\n'
    by_path, by_table = tmp_path / "path.toml", tmp_path / "table.toml"
    by_path.write_text(f'spec = "{spec_file.name}"\n' + places)
    by_table.write_text(places + '[spec.modalities.labs]\ncolumn = "labs"\n[fit]\nepochs = 3\n[impute]\ninterval = 0.9\n')
    assert read_config(by_path).spec == read_spec(spec_file)
    assert read_config(by_table).spec.modalities == {"labs": ModalitySpec(column="labs")}
    assert read_config(by_table).fit.epochs == 3 and read_config(by_table).impute.interval == 0.9


def test_interval():
    assert ImputeSettings(interval=0.9).interval == 0.9
    # The command line gives 0.0: both are the same settings, so the same digest.
    assert ImputeSettings(interval=0.0).model_dump_json() == ImputeSettings().model_dump_json()


def test_config_mistakes(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('shards = "a"\nmodel = "b"\noutput = "c"\nspec = "cohort.toml"\n')
    with pytest.raises(UserError, match=r"cohort\.toml: no such file"):
        read_config(path)
    path.write_text('shards = "a"\nmodel = "b"\noutput = "c"\n[spec.modalities.a]\ncolumn = "a"\n[fit]\nepoch = 3\n')
    with pytest.raises(UserError, match=r"unknown key 'fit.epoch'; valid keys here: seed, epochs"):
        read_config(path)
    path.write_text('shards = "a"\nmodel = "b"\noutput = "c"\n[spec.modalities.a]\ncolumn = "a"\n[impute]\ninterval = 0.7\n')
    with pytest.raises(UserError, match=r"impute.interval: Input should be 0, 0.5, 0.8, 0.9 or 0.95"):
        read_config(path)


def test_labels_have_a_weight_or_a_table(tmp_path):
    path = tmp_path / "cohort.toml"
    path.write_text(MODALITY + '[contrastive]\non = "labs"\n[contrastive.labels]\nsex = 2\nage = {soft = true}\n')
    found = read_spec(path).contrastive
    assert found.on == ("labs",) and found.labels["sex"].weight == 2
    assert (found.labels["age"].soft, found.labels["age"].weight) == (True, 1)


def test_a_head_that_is_not_there_leaves_the_digest_of_settings_as_it_was():
    from mmimpute.imputing import settings_digest

    assert settings_digest(ImputeSettings()) != settings_digest(ImputeSettings(head="a/heads/" + "0" * 32))
    assert "head" not in ImputeSettings().model_dump_json(exclude_none=True)
