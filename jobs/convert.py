"""Write a checkpoint of any layout as another: hub names, transformers 5's fused names, or Mistral's."""

import sys

from batchmix.config import Config
from batchmix.hydra_app import job


@job("convert")
def main(config: Config) -> None:
    from batchmix.checkpoints.convert import convert  # imports torch: only once the configuration is known to be right

    convert(config)


if __name__ == "__main__":
    sys.exit(main())
