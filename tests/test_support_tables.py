"""The pages on models, engines and trainers match the output of their scripts."""

from __future__ import annotations

import engine_table
import model_table
import pytest
import trainer_table
import transformers
from packaging.version import Version


@pytest.mark.parametrize("table", [engine_table, trainer_table], ids=lambda table: table.__name__)
def test_page_is_up_to_date(table):
    assert table.PAGE.read_text(encoding="utf-8") == table.documentation()


def test_page_on_models_is_up_to_date():
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("earlier versions of transformers lack some types")
    assert model_table.PAGE.read_text(encoding="utf-8") == model_table.documentation()


def test_row_without_its_test_is_an_error():
    row = trainer_table.Row("a trainer", "test_trl.py::test_that_is_not_there", "")
    with pytest.raises(ValueError, match=r"^tests/test_trl\.py has no test_that_is_not_there"):
        trainer_table.check(row)
