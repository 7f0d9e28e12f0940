"""The computations, as TensorIR: stage 1 (`partial`) and stage 2 (`merge`). Nothing about speed."""
