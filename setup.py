"""The native kernels, which the package does without where no compiler is (see model/native.py)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "qwen2.model._kernels",
            ["src/qwen2/model/kernels.cpp"],
            language="c++",
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-march=native",  # built where it is used; native.py checks that it still is
                "-mprefer-vector-width=512",  # GCC 12 splits the vectors of 512 bits otherwise
                "-fno-math-errno",
                "-pthread",
                "-w",  # GCC warns of its own header's intrinsics
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
