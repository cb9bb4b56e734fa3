"""A rival for masks: a random forest that judges each pixel by its features at several scales.

This is what interactive tools such as ilastik do. scikit-image and scikit-learn are imported only
when it is used. Axes: N images, H W pixels, D features.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot_rt.errors import DataError
from fewshot_rt.images import Pixels

from .draws import demo_packages

TREES = 100
LEAST_SIGMA, MOST_SIGMA = 1, 16


class PixelForest:
    """A random forest over intensity, edges and texture, each blurred by 1 to 16 pixels.

    pixels: of each image that it learns from, at most, drawn by the seed. jobs: threads, each with
        its trees; the answer does not depend on them.
    Source: Breiman 2001; Berg et al. 2019 (ilastik).
    """

    def __init__(self, *, pixels: int = 4000, seed: int = 0, jobs: int = 1) -> None:
        self.pixels, self.seed, self.jobs = pixels, seed, jobs
        self._forest: Any = None

    def fit(self, inputs: Pixels, masks: NDArray[np.bool_]) -> "PixelForest":
        """Learn from images and their masks; give itself.

        Shapes: inputs uint8 [N, H, W, 3]; masks bool [N, H, W].
        Raises: DataError if scikit-image or scikit-learn is not installed.
        """
        with demo_packages():
            from sklearn.ensemble import RandomForestClassifier
        rng = np.random.default_rng(self.seed)
        features, classes = [], []
        for image, mask in zip(inputs, masks, strict=True):
            chosen = rng.permutation(mask.size)[: self.pixels]
            features.append(_features(image)[chosen])
            classes.append(mask.ravel()[chosen])
        self._forest = RandomForestClassifier(
            n_estimators=TREES, random_state=self.seed, n_jobs=self.jobs
        )
        self._forest.fit(np.concatenate(features), np.concatenate(classes))
        return self

    def predict(self, inputs: Pixels) -> Pixels:
        """Give masks as files have them, 0 and 255.

        Shapes: inputs uint8 [N, H, W, 3]; result uint8 [N, H, W].
        Raises: DataError if it has not learned yet.
        """
        if self._forest is None:
            raise DataError("the forest has not learned from any image: call fit first.")
        found = [self._forest.predict(_features(image)) for image in inputs]
        masks = np.stack(found).reshape(inputs.shape[:3])
        return np.where(masks, 255, 0).astype(np.uint8)


def _features(image: Pixels) -> NDArray[np.float32]:
    """Give the features of every pixel. Shapes: uint8 [H, W, 3] -> [H W, D]."""
    with demo_packages():
        from skimage.feature import multiscale_basic_features
    features: NDArray[np.float32] = multiscale_basic_features(
        image, sigma_min=LEAST_SIGMA, sigma_max=MOST_SIGMA, channel_axis=-1
    )
    return features.reshape(-1, features.shape[-1])
