"""Token policies: which tokens a latent cache keeps."""
