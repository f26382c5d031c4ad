"""Small TFLite files made on the spot, with the flatbuffer schema that LiteRT brings along."""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

OP, OPTIONS, KIND = schema.BuiltinOperator, schema.BuiltinOptions, schema.TensorType
FLOAT, TEXT, INT32, RESOURCE = KIND.FLOAT32, KIND.STRING, KIND.INT32, KIND.RESOURCE


def tensor(name, kind=FLOAT, shape=(), *, free=None, content=None, variable=False, has_rank=True):
    """`free` is the shape with -1 where any size goes."""
    made = schema.TensorT()
    made.name, made.type, made.shape, made.hasRank = name, kind, list(shape), has_rank
    made.isVariable, made.content = variable, content
    if free is not None:
        made.shapeSignature = list(free)
    return made


def operator(code, inputs, outputs, kind=OPTIONS.NONE, **options):
    made = schema.OperatorT()
    made.code, made.inputs, made.outputs = code, list(inputs), list(outputs)
    if kind:
        made.builtinOptionsType = kind
        made.builtinOptions = getattr(schema, _name(kind) + "T")()
        for name, value in options.items():
            setattr(made.builtinOptions, name, value)
    return made


def _name(kind):
    return next(name for name, value in vars(OPTIONS).items() if value == kind)


def add(left, right, output):
    return operator(OP.ADD, [left, right], [output], OPTIONS.AddOptions)


def subtract(left, right, output):
    return operator(OP.SUB, [left, right], [output], OPTIONS.SubOptions)


def handle(name, output):
    return operator(OP.VAR_HANDLE, [], [output], OPTIONS.VarHandleOptions, container="", sharedName=name)


def read(variable, output):
    return operator(OP.READ_VARIABLE, [variable], [output], OPTIONS.ReadVariableOptions)


def assign(variable, value):
    return operator(OP.ASSIGN_VARIABLE, [variable, value], [], OPTIONS.AssignVariableOptions)


def once(subgraph):
    return operator(OP.CALL_ONCE, [], [], OPTIONS.CallOnceOptions, initSubgraphIndex=subgraph)


def graph(tensors, operators, inputs, outputs):
    made = schema.SubGraphT()
    made.tensors, made.operators, made.inputs, made.outputs = tensors, operators, list(inputs), list(outputs)
    return made


def signature(key, subgraph, inputs, outputs):
    """`inputs` and `outputs`: name → index."""
    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex, made.inputs, made.outputs = key, subgraph, _maps(inputs), _maps(outputs)
    return made


def _maps(names):
    found = []
    for name, index in names.items():
        made = schema.TensorMapT()
        made.name, made.tensorIndex = name, index
        found.append(made)
    return found


def save(path, graphs, signatures=(), custom=None):
    model = schema.ModelT()
    model.version, model.subgraphs, model.signatureDefs = 3, list(graphs), list(signatures)
    model.buffers, model.operatorCodes = [schema.BufferT()], []
    codes = []
    for part in graphs:
        for made in part.tensors:
            if made.content is not None:
                buffer = schema.BufferT()
                buffer.data = np.frombuffer(np.asarray(made.content).tobytes(), np.uint8)
                made.buffer = len(model.buffers)
                model.buffers.append(buffer)
        for made in part.operators:
            if made.code not in codes:
                codes.append(made.code)
                code = schema.OperatorCodeT()
                code.builtinCode, code.deprecatedBuiltinCode, code.version = made.code, min(made.code, 127), 1
                code.customCode = custom
                model.operatorCodes.append(code)
            made.opcodeIndex = codes.index(made.code)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


# -- models ----------------------------------------------------------------------------------------------------------------------


def counter(path, begin=5.0, signatures=()):
    """total = x + what it was before, `begin` at first: a resource variable that a subgraph begins, as streaming models have."""
    main = graph(
        [tensor("x", shape=[1]), tensor("h", RESOURCE), tensor("v", shape=[1]), tensor("total", shape=[1])],
        [once(1), handle("a", 1), read(1, 2), add(0, 2, 3), assign(1, 3)],
        [0],
        [3],
    )
    init = graph(
        [tensor("h", RESOURCE), tensor("begin", shape=[1], content=np.float32([begin]))], [handle("a", 0), assign(0, 1)], [], []
    )
    return save(path, [main, init], signatures)


def stages(path):
    """Two signatures that share a variable: `add` gives total = x + what it was before, `look` gives seen = the total, times one."""
    main = graph(
        [tensor("x", shape=[1]), tensor("h", RESOURCE), tensor("v", shape=[1]), tensor("total", shape=[1])],
        [once(1), handle("a", 1), read(1, 2), add(0, 2, 3), assign(1, 3)],
        [0],
        [3],
    )
    init = graph(
        [tensor("h", RESOURCE), tensor("zero", shape=[1], content=np.float32([0]))], [handle("a", 0), assign(0, 1)], [], []
    )
    look = graph(
        [tensor("y", shape=[1]), tensor("h", RESOURCE), tensor("v", shape=[1]), tensor("seen", shape=[1])],
        [once(1), handle("a", 1), read(1, 2), add(0, 2, 3)],
        [0],
        [3],
    )
    return save(
        path, [main, init, look], [signature("add", 0, {"x": 0}, {"total": 3}), signature("look", 2, {"y": 0}, {"seen": 3})]
    )


def recurrent(path):
    """A simple recurrent cell over a variable tensor: state = relu(x + state), y = state."""
    one, zero = np.float32([[1.0]]), np.float32([0.0])
    return save(path, [graph(
        [
            tensor("x", shape=[1, 1]), tensor("w", shape=[1, 1], content=one), tensor("r", shape=[1, 1], content=one),
            tensor("b", shape=[1], content=zero), tensor("state", shape=[1, 1], variable=True), tensor("y", shape=[1, 1]),
        ],
        [operator(OP.RNN, [0, 1, 2, 3, 4], [5], OPTIONS.RNNOptions, fusedActivationFunction=schema.ActivationFunctionType.RELU)],
        [0], [5],
    )])  # fmt: skip


def reshaped(path, kind, before, after, **how):
    """y is x in another shape."""
    tensors = [
        tensor("x", kind, before, **how), tensor("y", kind, [abs(n) for n in after], free=after),
        tensor("s", INT32, [len(after)], content=np.int32(after)),
    ]  # fmt: skip
    return save(path, [graph(tensors, [operator(OP.RESHAPE, [0, 2], [1], OPTIONS.ReshapeOptions, newShape=after)], [0], [1])])


def coder(path, *, default=False):
    """Two signatures in two subgraphs: `encode` gives y = x + x, `decode` gives sum = a + b and difference = a - b."""
    encode = graph(
        [tensor("encode_x:0", shape=[1, 2], free=[-1, 2]), tensor("Call:0", shape=[1, 2], free=[-1, 2])],
        [add(0, 0, 1)],
        [0],
        [1],
    )
    decode = graph(
        [tensor(name, shape=[3]) for name in ("decode_a:0", "decode_b:0", "Call_1:0", "Call_1:1")],
        [add(0, 1, 2), subtract(0, 1, 3)],
        [0, 1],
        [2, 3],
    )
    signatures = [
        signature("encode", 0, {"x": 0}, {"y": 1}),
        signature("serving_default" if default else "decode", 1, {"b": 1, "a": 0}, {"sum": 2, "difference": 3}),
    ]
    return save(path, [encode, decode], signatures)


def nameless(path, names=("", "", "same", "same"), *, signed=True):
    """sum = a + b, difference = a - b; tensors of its graph have these names."""
    tensors = [tensor(name, shape=[2]) for name in names]
    said = [signature("serving_default", 0, {"a": 0, "b": 1}, {"sum": 2, "difference": 3})] if signed else []
    return save(path, [graph(tensors, [add(0, 1, 2), subtract(0, 1, 3)], [0, 1], [2, 3])], said)


def twice(path):
    """y = x + x, where x and y are listed twice."""
    tensors = [tensor("x", shape=[2]), tensor("y", shape=[2])]
    return save(path, [graph(tensors, [add(0, 0, 1)], [0, 0], [1, 1])])


def windows(path):
    """y float32 [n / 4, 4] of x float32 [1, n]: the file's own shape, [1, 1], stands for any and is too small."""
    tensors = [
        tensor("x", shape=[1, 1], free=[-1, -1]), tensor("y", shape=[1, 4], free=[-1, 4]),
        tensor("s", INT32, [2], content=np.int32([-1, 4])),
    ]  # fmt: skip
    return save(path, [graph(tensors, [operator(OP.RESHAPE, [0, 2], [1], OPTIONS.ReshapeOptions, newShape=[-1, 4])], [0], [1])])


def unwritten(path, kind=FLOAT):
    """y = x + x, and an output that nothing writes."""
    tensors = [tensor("x", shape=[2]), tensor("y", shape=[2]), tensor("nothing", kind, shape=[2])]
    return save(path, [graph(tensors, [add(0, 0, 1)], [0], [1, 2])])


def remainder(path, kind=INT32, divisor=None):
    """y = x mod z; `divisor` makes z a constant."""
    tensors = [tensor("x", kind, (1,)), tensor("z", kind, (1,), content=divisor), tensor("y", kind, (1,))]
    take = operator(OP.FLOOR_MOD, [0, 1], [2], OPTIONS.FloorModOptions)
    return save(path, [graph(tensors, [take], [0, 1] if divisor is None else [0], [2])])


def filled(path, says="values"):
    """y is filled with `v`, as often as the values of `x` say, or as its shape does."""
    tensors = [tensor("x", INT32, (1,)), tensor("v", FLOAT), tensor("y", FLOAT, (1,), free=(-1,)), tensor("s", INT32, (1,))]
    nodes = [operator(OP.FILL, [0 if says == "values" else 3, 1], [2], OPTIONS.FillOptions)]
    if says == "shape":
        nodes.insert(0, operator(OP.SHAPE, [0], [3], OPTIONS.ShapeOptions, outType=INT32))
    return save(path, [graph(tensors, nodes, [0, 1], [2])])


def counts(path, until="input"):
    """y, int32 [1], is counted up from 0 while it is below the input x, below a constant, or for ever (`same`: by 0 steps)."""
    three, one = np.int32([3]), np.int32([0 if until == "same" else 1])
    zero = tensor("zero", INT32, (1,), content=np.int32([0]))
    main = [tensor("x", INT32, (1,)), zero, tensor("y", INT32, (1,)), tensor("most", INT32, (1,))]
    loop = operator(OP.WHILE, [1, 0], [2, 3], OPTIONS.WhileOptions, condSubgraphIndex=1, bodySubgraphIndex=2)
    test = [
        tensor("v", INT32, (1,)),
        tensor("m", INT32, (1,)),
        tensor("go", KIND.BOOL, (1,)),
        tensor("three", INT32, (1,), content=three),
    ]
    below = operator(OP.LESS, [0, 1 if until == "input" else 3], [2], OPTIONS.LessOptions)
    body = [
        tensor("v", INT32, (1,)),
        tensor("m", INT32, (1,)),
        tensor("w", INT32, (1,)),
        tensor("one", INT32, (1,), content=one),
    ]
    return save(
        path, [graph(main, [loop], [0], [2]), graph(test, [below], [0, 1], [2]), graph(body, [add(0, 3, 2)], [0, 1], [2, 1])]
    )


def chain(path):
    """y = the sum of 4 x, float32 [n], with tensors between that the engine keeps the memory of."""
    tensors = [tensor(name, FLOAT, (1,), free=(-1,)) for name in ("x", "a", "b")]
    tensors += [tensor("y", FLOAT, (1,)), tensor("axis", INT32, (1,), content=np.int32([0]))]
    total = operator(OP.SUM, [2, 4], [3], OPTIONS.ReducerOptions, keepDims=True)
    return save(path, [graph(tensors, [add(0, 0, 1), add(1, 1, 2), total], [0], [3])])


def custom(path, name):
    """y is what the custom operator `name` makes of x."""
    tensors = [tensor("x", shape=[2]), tensor("y", shape=[2])]
    return save(path, [graph(tensors, [operator(OP.CUSTOM, [0], [1])], [0], [1])], custom=name)
