"""The scales of reproduction: the paper's, a small one on photographs, and a tiny one. Every number stands here.

Comments say whose value it is where the paper is silent.
"""

from dataclasses import replace
from pathlib import Path

from eqvae.networks.features import INCEPTION
from eqvae.networks.pretrained import EFFICIENTNET_LITE0
from eqvae.paper.plan import ReferenceConfig
from eqvae.paper.setting import GIVEN_LATER, Family, ScaleName, Setting
from eqvae.runs.encode import EncodeConfig
from eqvae.runs.evaluate import EvaluateConfig
from eqvae.runs.finetune import FinetuneConfig
from eqvae.runs.sample import SampleConfig
from eqvae.runs.score import ScoreConfig
from eqvae.runs.train_config import TrainConfig
from eqvae.runtime.run_folder import change_flat, from_flat

_CONTINUOUS: tuple[Family, ...] = ("dit", "sit", "repa-sit")
_TEMPLATE = Path()

# fmt: off
# The paper ----------------------------------------------------------------------------------------------------------

_IMAGENET_TRAIN, _IMAGENET_VALIDATION = "hf:ILSVRC/imagenet-1k:train", "hf:ILSVRC/imagenet-1k:validation"
_IMAGENET_STEPS_PER_EPOCH = 5005
"""1,281,167 images in batches of 256."""

_PAPER_FINETUNING = from_flat(
    FinetuneConfig, autoencoder="", out=_TEMPLATE,
    data=GIVEN_LATER,  # OpenImages
    validation_data=_IMAGENET_VALIDATION,
    image_size=256,
    # The released code's, 10 for each of 8 GPUs and twice accumulated; the paper says "batch size 10".
    batch_size=160,
    gradient_accumulation_steps=16,  # each part of 10 draws its own tau, as each GPU did
    learning_rate=7.2e-4,  # the released code's: 160 times LDM's 4.5e-6
    lr_scheduler="constant", lr_warmup_steps=0,  # the released code's
    adam_beta1=0.5, adam_beta2=0.9,  # LDM's
    max_grad_norm=0.0, ema_decay=0.0,  # LDM's autoencoders: neither
    transforms="paper", equivariance_probability=0.5,
    perceptual="lpips", perceptual_weight=1.0,
    kl_weight=1e-6, adversarial_weight=0.5, discriminator_warmup_steps=0,  # the released code's
    num_validation_images=512, num_statistics_images=5000,
    validate_every=5000, checkpoint_every=1000,
)

_PAPER_TRAINING = TrainConfig(
    recipe="", latents=_TEMPLATE, out=_TEMPLATE,
    max_steps=400_000, batch_size=256,
    learning_rate=1e-4, ema_decay=0.9999, label_dropout=0.1,  # DiT's, SiT's and REPA's
    # Watched by the protocol of the tables: 50,000 samples of 250 steps at each row of Tables 9 and 10.
    sample_every=50_000, num_watch_samples=50_000, watch_steps=250,
    features=INCEPTION,
    checkpoint_every=5000, log_every=100,
)

_PAPER_SAMPLING = SampleConfig(run="", out=_TEMPLATE, num_samples=50_000, num_steps=250)
_PAPER_MASKGIT_SAMPLING = SampleConfig(
    run="", out=_TEMPLATE, num_samples=50_000,
    num_steps=8,  # MaskGIT's
    guidance_scale=4.0,  # w = 3 in (1 + w) c - w u of Besnier & Chen, arXiv:2310.14400, whom the paper follows
)

PAPER = Setting(
    name="paper",
    num_images=1_281_167,
    num_validation_images=50_000,
    num_reference_images=10_000,  # ADM's batch holds so many, and the moments of all
    num_classes=1000,
    autoencoders={
        "SD-VAE": "sd-vae",
        "SDXL-VAE": "sdxl-vae",
        "SD3-VAE": "sd3-vae",
        "SD-VAE-16": "sd-vae-16",
        "VQ-GAN": "vqgan-f16-1024",
    },
    generator_base="sd-vae-ft-ema",
    finetuning=_PAPER_FINETUNING,
    discrete_finetuning=change_flat(
        _PAPER_FINETUNING,
        adversarial_weight=0.8, codebook_weight=0.25, commitment_weight=1.0,  # taming-transformers'
    ),
    epochs=5,
    steps_per_epoch=10_000,
    figure5_epochs=(1, 2, 3, 4, 5),
    evaluation=EvaluateConfig(
        autoencoder="", out=_TEMPLATE, data=_IMAGENET_VALIDATION, image_size=256, features=INCEPTION, lpips=True,
        all=True, batch_size=32,
    ),
    encoding=EncodeConfig(autoencoder="", out=_TEMPLATE, data=_IMAGENET_TRAIN, image_size=256),
    reference=ReferenceConfig(reference=GIVEN_LATER, out=_TEMPLATE, image_size=256, features=INCEPTION),  # ADM's batch
    training={
        "dit": _PAPER_TRAINING,
        "sit": _PAPER_TRAINING,
        "repa-sit": change_flat(_PAPER_TRAINING, max_grad_norm=1.0, repa_weight=0.5, repa_depth=8),  # REPA's
        "maskgit": replace(
            _PAPER_TRAINING,
            max_steps=300 * _IMAGENET_STEPS_PER_EPOCH,
            sample_every=10 * _IMAGENET_STEPS_PER_EPOCH,
            num_watch_samples=10_000, watch_steps=8,  # unguided, so no row of a table
        ),
    },
    sizes={"b": "b", "xl": "xl", "maskgit": "b"},
    tokens_per_side=16,
    guided_steps={
        "dit": 7_000_000, "dit+eq": 1_500_000, "sit": 7_000_000, "repa-sit": 4_000_000, "repa-sit+eq": 1_000_000,
    },
    sampling=dict.fromkeys(_CONTINUOUS, _PAPER_SAMPLING) | {"maskgit": _PAPER_MASKGIT_SAMPLING},
    guided_sampling={
        "dit": replace(_PAPER_SAMPLING, guidance_scale=1.5, guidance_channels=3),  # DiT's
        "sit": replace(_PAPER_SAMPLING, guidance_scale=1.5, guidance_channels=3),  # SiT's
        "repa-sit": replace(_PAPER_SAMPLING, guidance_scale=1.8, guidance_high=0.7),  # REPA's, with the interval
        "maskgit": _PAPER_MASKGIT_SAMPLING,
    },
    scoring=ScoreConfig(samples=_TEMPLATE, reference="", out=_TEMPLATE, features=INCEPTION),
    fixed_factors={"sd-vae": 0.18215, "sd-vae-ft-ema": 0.18215, "sdxl-vae": 0.13025, "sd3-vae": 1.5305},
    seeds=(0,),
)
"""What the paper did, as far as it or its code says; else the defaults of those whom it follows."""

# Photographs on two CPU cores -----------------------------------------------------------------------------------------

_WOOF_TRAIN, _WOOF_TEST = "hf:frgfm/imagewoof/320px:train", "hf:frgfm/imagewoof/320px:validation"

_SMALL_FINETUNING = from_flat(
    FinetuneConfig, autoencoder="", out=_TEMPLATE,
    data=_WOOF_TRAIN, validation_data=_WOOF_TEST,
    image_size=128, batch_size=8,
    learning_rate=5e-4, lr_scheduler="cosine", adam_beta1=0.5, adam_beta2=0.99,
    ema_decay=0.99,  # for a thousand steps
    polish_steps=500,  # the decoder alone: with EQ-VAE's latents it gains most, docs/log.md
    transforms="paper", equivariance_probability=0.5, min_scale=0.25,
    resolution_weighting="equal",  # "area" leaves the error of scale where it was, docs/log.md
    perceptual="efficientnet-lite0", perceptual_weight=1.0,
    # PatchGAN sees no fewer than 24 px, and at a scale of 0.25 there are 32. Fewer steps of warm-up hit the adaptive
    # weight's clamp, docs/log.md.
    adversarial_weight=0.5, discriminator_warmup_steps=100,
    kl_weight=1e-6,
    num_validation_images=64, num_statistics_images=256, validate_every=500, checkpoint_every=100, num_workers=0,
)

_SMALL_TRAINING = TrainConfig(
    recipe="", latents=_TEMPLATE, out=_TEMPLATE,
    max_steps=1000, batch_size=64,  # 64,000 images: six minutes of one core
    learning_rate=1e-3, lr_warmup_steps=100, adam_beta2=0.99,  # small transformers take them, docs/results/cifar10
    ema_decay=0.99,
    label_dropout=0.1,  # DiT's
    # Twenty calls of the network for an image, as few as the published samplers can't do with: by 20 steps of SiT's SDE
    # the seeds of one arm stood 60 apart, by Heun's ODE 6, docs/results/small.
    sample_every=500, num_watch_samples=1000, watch_steps=10, watch_sampler="heun",
    features=EFFICIENTNET_LITE0,
    checkpoint_every=250,
)
# Learning curves: 409,600 images, with a longer average, since with 0.99 the rate's own noise sets their end. They are
# measured 16 times, at all rows of Tables 9 and 10.
_SMALL_CURVE = replace(_SMALL_TRAINING, max_steps=6400, ema_decay=0.998, sample_every=400)
_SMALL_REPA = {"teacher": EFFICIENTNET_LITE0, "cache_teacher": True}
_SMALL_DIT = {"watch_steps": 20, "watch_sampler": "ddim"}

_SMALL_SAMPLING = SampleConfig(run="", out=_TEMPLATE, num_samples=10_000, num_steps=10, sampler="heun")
_SMALL_DIT_SAMPLING = replace(_SMALL_SAMPLING, num_steps=20, sampler="ddim")
_SMALL_MASKGIT_SAMPLING = replace(_SMALL_SAMPLING, num_steps=8, sampler=None, guidance_scale=4.0)

SMALL = Setting(
    name="small",
    num_images=9023,
    num_validation_images=3928,
    num_reference_images=3928,
    num_classes=10,
    autoencoders={"SD-VAE": "taesd", "SDXL-VAE": "taesdxl", "SD3-VAE": "taesd3", "VQ-GAN": "tiny-vq"},
    generator_base="taesd",
    finetuning=_SMALL_FINETUNING,
    discrete_finetuning=change_flat(
        _SMALL_FINETUNING,
        codebook="ema", commitment_weight=0.25, restart_dead_codes=100,  # as the base was trained, docs/results/tiny-vq
    ),
    autoencoder_seeds=(0, 1),
    epochs=5,
    steps_per_epoch=200,
    figure5_epochs=(1, 5),  # the paper's figures
    evaluation=EvaluateConfig(
        autoencoder="", out=_TEMPLATE, data=_WOOF_TEST, image_size=128, features=EFFICIENTNET_LITE0, all=True,
        num_images=500, batch_size=25, num_pictures=6,
    ),
    encoding=EncodeConfig(autoencoder="", out=_TEMPLATE, data=_WOOF_TRAIN, image_size=128),
    reference=ReferenceConfig(reference=_WOOF_TEST, out=_TEMPLATE, image_size=128, features=EFFICIENTNET_LITE0),
    training={
        "dit": change_flat(_SMALL_TRAINING, **_SMALL_DIT),
        "sit": _SMALL_TRAINING,
        "repa-sit": change_flat(_SMALL_TRAINING, **_SMALL_REPA),
        "maskgit": replace(
            _SMALL_TRAINING,
            adam_beta2=None,  # as published
            max_steps=1500, ema_decay=0.998,
            sample_every=250, watch_steps=8, watch_sampler=None,  # rows 50, 100, 200 and 300 of the 300 epochs
        ),
    },
    long_training={
        "dit": change_flat(_SMALL_CURVE, **_SMALL_DIT), "sit": _SMALL_CURVE,
        "repa-sit": change_flat(_SMALL_CURVE, **_SMALL_REPA),
    },
    sizes={"b": "ti", "xl": "ti", "maskgit": "ti"},
    tokens_per_side=8,
    guided_steps={},
    sampling={
        "dit": _SMALL_DIT_SAMPLING, "sit": _SMALL_SAMPLING, "repa-sit": _SMALL_SAMPLING,
        "maskgit": _SMALL_MASKGIT_SAMPLING,
    },
    guided_sampling={
        "dit": replace(_SMALL_DIT_SAMPLING, guidance_scale=1.5),
        "sit": replace(_SMALL_SAMPLING, guidance_scale=1.5),
        "repa-sit": replace(_SMALL_SAMPLING, guidance_scale=1.8, guidance_high=0.7),
        "maskgit": _SMALL_MASKGIT_SAMPLING,
    },
    scoring=ScoreConfig(samples=_TEMPLATE, reference="", out=_TEMPLATE, features=EFFICIENTNET_LITE0),
    both_normalizations=False,  # `causes` asks what scale does
    kernel_distances=True,
    fixed_factors={},
    seeds=(0, 1, 2),
)
"""The paper's experiment on photographs of dogs at 128 px, with autoencoders that have the disease: TAESD's latents are
SD-VAE's. 64 tokens for each generator; Table 5 from nothing in 5 hours of two cores (tests/paper/test_small.py). Sizes,
steps, rates and samplers are ours, the scales of guidance the published ones."""

# A tiny twin --------------------------------------------------------------------------------------------------------

_CIFAR_TRAIN, _CIFAR_TEST = "hf:uoft-cs/cifar10:train", "hf:uoft-cs/cifar10:test"

_TINY_FINETUNING = from_flat(
    FinetuneConfig, autoencoder="", out=_TEMPLATE,
    data=_CIFAR_TRAIN, validation_data=_CIFAR_TEST,
    image_size=64,  # of pictures of 32 px: as smooth at the scale of a pixel as a photograph is at 256 px
    batch_size=16, learning_rate=5e-4, lr_scheduler="cosine",  # as the autoencoders of docs/results/cifar10
    adam_beta1=0.5, adam_beta2=0.99,
    ema_decay=0.99,  # for some hundred steps
    transforms="paper", equivariance_probability=0.5, min_scale=0.25,
    resolution_weighting="equal",  # "area" leaves the error of scale where it was, docs/log.md
    perceptual="efficientnet-lite0", perceptual_weight=0.3,  # as those
    # At a scale of 0.25 the 64 px are 16 px, and PatchGAN sees no fewer than 24.
    adversarial_weight=0.0,
    kl_weight=1e-6,
    num_validation_images=256, validate_every=250, checkpoint_every=250,
)

_TINY_TRAINING = TrainConfig(
    recipe="", latents=_TEMPLATE, out=_TEMPLATE,
    max_steps=600, batch_size=32,
    learning_rate=1e-3, lr_warmup_steps=100, adam_beta2=0.99,  # docs/results/cifar10; small transformers take them
    ema_decay=0.99,  # after 600 steps 0.999 would still hold half of the first weights
    label_dropout=0.1,  # DiT's
    # 2 watches are 2 of the 4 rows of Tables 9 and 10, at half and all of the steps.
    sample_every=300, num_watch_samples=300, watch_steps=16,
    features=EFFICIENTNET_LITE0,
    checkpoint_every=250,
)

_TINY_SAMPLING = SampleConfig(run="", out=_TEMPLATE, num_samples=1000, num_steps=25)
_TINY_MASKGIT_SAMPLING = SampleConfig(run="", out=_TEMPLATE, num_samples=1000, num_steps=8, guidance_scale=4.0)

TINY = Setting(
    name="tiny",
    num_images=50_000,
    num_validation_images=10_000,
    num_reference_images=10_000,
    num_classes=10,
    autoencoders={"SD-VAE": "tiny-kl", "VQ-GAN": "tiny-vq"},
    generator_base="tiny-kl",
    finetuning=_TINY_FINETUNING,
    discrete_finetuning=change_flat(
        _TINY_FINETUNING,
        codebook="ema", commitment_weight=0.25, restart_dead_codes=100,  # as the base was trained, docs/results/tiny-vq
    ),
    epochs=5,
    steps_per_epoch=80,
    figure5_epochs=(1, 5),  # the paper's figures
    evaluation=EvaluateConfig(
        autoencoder="", out=_TEMPLATE, data=_CIFAR_TEST, image_size=64, features=EFFICIENTNET_LITE0, all=True,
        num_images=300, batch_size=50, num_pictures=6,
    ),
    encoding=EncodeConfig(
        autoencoder="", out=_TEMPLATE, data=_CIFAR_TRAIN, image_size=64, num_images=20_000, batch_size=256
    ),
    reference=ReferenceConfig(reference=_CIFAR_TEST, out=_TEMPLATE, image_size=64, features=EFFICIENTNET_LITE0),
    training={
        "dit": _TINY_TRAINING,
        "sit": _TINY_TRAINING,
        "repa-sit": change_flat(_TINY_TRAINING, teacher=EFFICIENTNET_LITE0, cache_teacher=True),
        "maskgit": replace(
            _TINY_TRAINING,
            adam_beta2=None,  # as published
            sample_every=200, watch_steps=8,  # 3 watches: rows 100, 200 and 300 of the paper's 300 epochs
        ),
    },
    sizes={"b": "ti", "xl": "ti", "maskgit": "ti"},
    tokens_per_side=4,
    guided_steps={},
    sampling=dict.fromkeys(_CONTINUOUS, _TINY_SAMPLING) | {"maskgit": _TINY_MASKGIT_SAMPLING},
    guided_sampling={
        "dit": replace(_TINY_SAMPLING, guidance_scale=1.5),
        "sit": replace(_TINY_SAMPLING, guidance_scale=1.5),
        "repa-sit": replace(_TINY_SAMPLING, guidance_scale=1.8, guidance_high=0.7),
        "maskgit": _TINY_MASKGIT_SAMPLING,
    },
    scoring=ScoreConfig(samples=_TEMPLATE, reference="", out=_TEMPLATE, features=EFFICIENTNET_LITE0),
    fixed_factors={},
    seeds=(0, 1, 2),
)
"""The same questions on two CPU cores: CIFAR-10 at 64 px, stride 8 and 4 channels as SD-VAE, minutes for each
generator. The published values of the generators' samplers are kept; sizes, steps and rates are ours."""

# fmt: on
SETTINGS: dict[ScaleName, Setting] = {"small": SMALL, "paper": PAPER, "tiny": TINY}
"""By `--scale`."""
