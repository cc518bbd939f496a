"""The names and signs that answers use, as tables.

Left out: how they combine (`rewards.mathematics.parsing`) and what they compute (`rewards.mathematics.evaluation`).
"""


def words(text: str) -> frozenset[str]:
    """The words of a text: tables of names are easier to read without quotes."""
    return frozenset(text.split())


RELATIONS = {
    "=": "=", "equiv": "=", "approx": "~", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "in": "in",
}  # fmt: skip
SET_OPERATORS = {"cup": "cup", "union": "cup", "cap": "cap", "setminus": "setminus", "U": "cup"}
CONNECTORS = words("and or und oder et ou y o e и или または もしくは あるいは および 及び と 和 或 或者")
CONSTANTS = {
    "pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf", "e": "e", "i": "i",
}  # fmt: skip
FUNCTIONS = {
    name: name
    for name in words("sin cos tan cot sec csc sinh cosh tanh asin acos atan log exp abs floor ceil min max gcd lcm")
} | {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "ln": "log", "lg": "log10", "sqrt": "root", "ceiling": "ceil",
}  # fmt: skip
GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega ell "
    "Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
OPAQUE_FUNCTIONS = frozenset("fghFGHP")  # a bracket after one of these letters holds its argument
COMMAND_SIGNS = words("times cdot div pm mp land lor quad to end circ bmod mod pmod dots rangle rfloor rceil")
CLOSINGS: dict[str, tuple[str, str | None]] = {
    "langle": ("rangle", None),
    "lfloor": ("rfloor", "floor"),
    "lceil": ("rceil", "ceil"),
}
UNSUPPORTED = words("int iint iiint oint sum prod lim limsup liminf partial nabla pmod bmod mod forall exists substack")
