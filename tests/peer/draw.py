"""Draw pictures with stable-diffusion-cpp-python; run by its own interpreter, standard library and Pillow only.

    peer-python tests/peer/draw.py '{"model": {...}, "runs": [{..., "output": "x.png"}, ...]}'

`model` are arguments of StableDiffusion, `runs` of its generate_image. One line "done OUTPUT SECONDS" for each picture.
"""

import json
import sys
import time

from stable_diffusion_cpp import StableDiffusion  # type: ignore[import-not-found]

job = json.loads(sys.argv[1])
model = StableDiffusion(**job["model"])
for run in job["runs"]:
    output = run.pop("output")
    if run.get("init_image"):
        from PIL import Image

        run["init_image"] = Image.open(run["init_image"])
    start = time.perf_counter()
    model.generate_image(**run)[0].save(output)
    print(f"done {output} {time.perf_counter() - start:.2f}", flush=True)
