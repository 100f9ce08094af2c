"""Sampling: pure functions from a prediction and noise to latents or tokens; guidance wraps the prediction.

predict = classifier_free_guidance(transformer, 1.5, null_label=specification.num_classes)
noise = ImageNoise(seed, indices, specification.shape, device=device)
z = ddpm(predict, noise, balanced_labels(indices, specification.num_classes), GaussianDiffusion(), num_steps=250)

noise = TokenNoise(seed, indices, (specification.height, specification.width), device=device)
tokens = confidence(transformer, noise, labels, specification, TokenDecoding(num_steps=8, guidance_scale=4.0))

Every sampler takes a prediction, perhaps guided (z, t and labels to the backbone's output, or tokens and labels to
logits); the noise of this batch's images; their labels, 0 ... num_classes - 1; and what the network was trained on. It
returns normalized latents (n, c, h, w), or tokens (n, h, w), each filled once. `callback` is told the state before each
step. Settings that make no sense, and outputs that are not finite, are a `UserError`.
"""
