"""As tests/bundles/test_federated.py, of a segmentation bundle."""

from tests.bundles.test_federated import check_two_sites
from tests.integration.conftest import BTCV


def test_two_sites_with_equal_labels_train_as_one(tmp_path, labelled_lists, foreign_python):
    check_two_sites(BTCV, labelled_lists["ct"], tmp_path, foreign_python)
