version: str
isas: tuple[str, ...]
compiler: str
cython: str
openmp: bool
