"""The serving engine as Gymnasium environments. Importing this package registers `governor/Serving-v0`.

In code that other processes import by id alone, use `gymnasium.make("envs:governor/Serving-v0")`.
"""

import gymnasium

SERVING_ID = "governor/Serving-v0"

if SERVING_ID not in gymnasium.registry:
    gymnasium.register(
        id=SERVING_ID,
        entry_point="envs.serving:ServingEnv",
        vector_entry_point="envs.vector:ServingVectorEnv",
    )
