"""Fast arithmetic for attention: imports torch and triton only."""

if __name__ == "kernels":
    # Python was started in the root of the sources, so this folder stands where transformers and
    # diffusers look for the Hugging Face package `kernels`. Version 0 tells them that it is absent.
    from importlib.metadata import packages_distributions

    if "kernels" in packages_distributions().get("kernels", []):
        raise ImportError(
            "the folder kernels/ of the fewshot-rt sources hides the installed package 'kernels' "
            "that diffusers uses. Start Python elsewhere, or with -P."
        )
    __version__ = "0"
