"""LitServe with the same scorer: `python -m benchmarks.lit_server MODEL PORT WORKERS BATCH_SIZE TIMEOUT`."""

import base64
import sys
from pathlib import Path

import litserve
import numpy as np

from jaxcls.classifier import load
from jaxcls.data.images import open_photo
from jaxcls.parallel import use_compilation_cache
from jaxcls.scoring import make_scorer
from jaxcls.storage import Storage


class Scores(litserve.LitAPI):
    """JSON `{"pixels": base64}` or `{"image": base64}` to a list of scores."""

    model: str

    def setup(self, device: str) -> None:
        """Load and compile in each worker."""
        use_compilation_cache(Storage.default().persistent / "compiled")
        self.classifier = load(self.model)
        self.sizes = sorted({1, self.max_batch_size})
        self.score = make_scorer(self.classifier, batch_sizes=self.sizes)
        for size in self.sizes:
            side = self.classifier.preprocess.size
            self.score(np.zeros((size, side, side, 3), np.uint8))
        print("a worker is set up", flush=True)

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        """Base64 to the network's input."""
        preprocess = self.classifier.preprocess
        if "pixels" in request:
            pixels = np.frombuffer(base64.b64decode(request["pixels"]), np.uint8)
            return pixels.reshape(preprocess.size, preprocess.size, 3)
        photo = open_photo(base64.b64decode(request["image"]))
        return preprocess.resize_and_crop(photo.decode(preprocess.short_side))

    def batch(self, inputs: list[np.ndarray]) -> tuple[np.ndarray, int]:
        """One array of a compiled size, and how many of its images are no padding."""
        size = next(size for size in self.sizes if size >= len(inputs))
        padding = np.zeros((size - len(inputs), *inputs[0].shape), np.uint8)
        return np.concatenate([np.stack(inputs), padding]), len(inputs)

    def predict(self, images: np.ndarray | tuple[np.ndarray, int]) -> np.ndarray:
        """Scores of a batch, or of one image."""
        if isinstance(images, np.ndarray):
            return self.score(images[None])[0]
        padded, num_images = images
        return self.score(padded)[:num_images]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        """A row for each image."""
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, list[float]]:
        """JSON."""
        return {"scores": output.tolist()}


def main() -> None:
    """Serve until the process is ended."""
    model, port, workers, batch_size, timeout = sys.argv[1:]
    api = Scores(max_batch_size=int(batch_size), batch_timeout=float(timeout))
    api.model = str(Path(model))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers))
    server.run(host="127.0.0.1", port=int(port), log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
