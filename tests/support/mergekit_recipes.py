"""Recipe files that evomerge and mergekit must read alike; $base, $math, $code and $chat are folders."""

import textwrap

import yaml

DETERMINISTIC = {
    "linear-1": (
        "{merge_method: linear, base_model: $base, slices: [{sources: [{model: $math, "
        "layer_range: [0, 4], parameters: {weight: 0.3}}]}]}"
    ),
    "linear-2": """
        merge_method: linear
        models:
          - {model: $math, parameters: {weight: 0.3}}
          - {model: $code, parameters: {weight: 0.6}}
        base_model: $math
        """,
    "linear-3-sum": """
        merge_method: linear
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.4}}
          - {model: $base, parameters: {weight: 0.1}}
          - {model: $chat, parameters: {weight: -0.3}}
        parameters: {normalize: false}
        """,
    "linear-gradients": """
        merge_method: linear
        base_model: $code
        models:
          - {model: $math, parameters: {weight: [0.1, 0.9]}}
          - {model: $code, parameters: {weight: [1, 0.5, 0.25, 0.7, 0.3]}}
          - {model: $chat}
        parameters: {weight: [0.2, 0.4, 0.1]}
        """,
    "linear-filters": """
        merge_method: linear
        base_model: $math
        models:
          - model: $math
            parameters:
              weight:
                - {filter: self_attn, value: [0.1, 0.8, 0.3]}
                - {filter: layers.2.mlp, value: 0.9}
                - {filter: mlp, value: 0.7}
                - {filter: embed_tokens, value: [0.15, 0.85]}
                - {value: 0.35}
          - model: $code
            parameters:
              weight:
                - {filter: norm, value: 0.2}
                - {filter: "*", value: 0.65}
        """,
    "linear-slices": """
        merge_method: linear
        slices:
          - sources:
              - {model: $math, layer_range: [0, 3], parameters: {weight: [0.2, 0.6]}}
              - {model: $code, layer_range: [1, 4]}
            parameters: {weight: [{filter: q_proj, value: 0.55}]}
          - sources:
              - {model: $chat, layer_range: [2, 4]}
              - {model: $code, layer_range: [0, 2], parameters: {weight: 0.45}}
            parameters: {weight: [0.8, 0.1], normalize: false}
        base_model: $math
        parameters: {weight: 0.35}
        """,
    "slerp": "{merge_method: slerp, base_model: $base, models: [{model: $math}], parameters: {t: 0.3}}",
    "slerp-base-listed-last": (
        "{merge_method: slerp, base_model: $base, models: [{model: $code}, {model: $base}], "
        "parameters: {t: 0.65}}"
    ),
    "slerp-base-end": (
        "{merge_method: slerp, base_model: $base, models: [{model: $base}, {model: $chat}], "
        "parameters: {t: 0}}"
    ),
    "slerp-other-end": (
        "{merge_method: slerp, base_model: $base, models: [{model: $base}, {model: $chat}], "
        "parameters: {t: 1}}"
    ),
    "slerp-filters": """
        merge_method: slerp
        slices:
          - sources:
              - {model: $base, layer_range: [0, 4]}
              - {model: $math, layer_range: [0, 4]}
        base_model: $base
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.45}
        """,
    "slerp-slices": """
        merge_method: slerp
        slices:
          - sources: [{model: $math, layer_range: [2, 4]}, {model: $base, layer_range: [0, 2]}]
            parameters: {t: [{filter: mlp, value: 0.2}]}
          - sources: [{model: $base, layer_range: [1, 4]}, {model: $math, layer_range: [0, 3]}]
            parameters: {t: [0.9, 0.15]}
        base_model: $base
        parameters: {t: [0.35, 0.55]}
        """,
    "slerp-base-of-the-slice": """
        merge_method: slerp
        slices:
          - sources: [{model: $math, layer_range: [0, 2]}, {model: $base, layer_range: [0, 2]}]
          - sources: [{model: $math, layer_range: [2, 4]}, {model: $base, layer_range: [2, 4]}]
            base_model: $math
        base_model: $base
        parameters: {t: 0.3}
        """,
    "task-arithmetic-1": (
        "{merge_method: task_arithmetic, base_model: $base, models: [{model: $math, "
        "parameters: {weight: 0.7}}]}"
    ),
    "task-arithmetic-2": """
        merge_method: task_arithmetic
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.7}}
          - {model: $base}
          - {model: $code, parameters: {weight: -0.35}}
        parameters: {lambda: 1.3}
        """,
    "task-arithmetic-3": """
        merge_method: task_arithmetic
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.7}}
          - {model: $code, parameters: {weight: [0.2, 1.1]}}
          - {model: $chat}
        parameters: {normalize: true, weight: 0.55}
        """,
    "task-arithmetic-cancelling": """
        merge_method: task_arithmetic
        base_model: $base
        models: [{model: $math, parameters: {weight: 0.3}}, {model: $code, parameters: {weight: -0.3}}]
        parameters: {normalize: true}
        """,
    "task-arithmetic-slices": """
        merge_method: task_arithmetic
        base_model: $base
        slices:
          - sources:
              - {model: $base, layer_range: [0, 2]}
              - {model: $math, layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: [0.1, 0.9]}]}}
              - {model: $code, layer_range: [2, 4]}
            parameters: {weight: [{filter: layers.1., value: 0.33}, {filter: layers.3., value: 0.44}],
                lambda: 0.9}
          - sources:
              - {model: $math, layer_range: [1, 4], parameters: {weight: [0.4, 0.6, 0.9]}}
              - {model: $code, layer_range: [0, 3], parameters: {weight: [{filter: layers.0,
                  value: 1.25}, {filter: head, value: 0.15}]}}
              - {model: $base, layer_range: [1, 4]}
        parameters: {weight: [{filter: norm, value: 0.77}, {value: 0.5}], lambda: [{filter: layers.4,
            value: 0.6}, {filter: lm_head, value: 1.4}]}
        """,
    "ties-1": (
        "{merge_method: ties, base_model: $base, models: [{model: $math, parameters: {weight: 0.7, "
        "density: 0.35}}]}"
    ),
    "ties-2": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.3, density: 0.5}}
          - {model: $code, parameters: {weight: 0.6, density: 0.81}}
        """,
    "ties-3": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.7, density: [0.9, 0.1]}}
          - {model: $code, parameters: {weight: [0.1, 0.9], density: 0.3}}
          - {model: $chat, parameters: {weight: -0.4}}
        parameters: {normalize: false, density: 0.62, lambda: 1.1, int8_mask: true}
        """,
    "ties-few": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.7, density: 0.0001}}
          - {model: $code, parameters: {weight: 0.2, density: 0}}
          - {model: $chat, parameters: {weight: 0.9, density: 1}}
        """,
    "ties-rescaled": """
        merge_method: ties
        base_model: $base
        models:
          - {model: $math, parameters: {weight: 0.7, density: 0.4}}
          - {model: $chat, parameters: {weight: 0.5, density: 0.6}}
        parameters: {rescale: true}
        """,
    "ties-filters": """
        merge_method: ties
        base_model: $base
        models:
          - model: $math
            parameters:
              weight: [{filter: mlp, value: 0.5}, {filter: attn, value: [0.2, 0.7, 0.4]}]
              density: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.6}]
          - model: $code
            parameters: {density: [{filter: layers.0, value: 1.0}]}
        parameters:
          weight: [{filter: head, value: 0.8}, {filter: "*", value: 0.3}]
          density: [0.4, 0.8]
          lambda: [{filter: mlp, value: 1.5}]
          normalize: [{filter: mlp, value: false}]
        """,
    "ties-slices": """
        merge_method: ties
        base_model: $base
        slices:
          - sources:
              - {model: $math, layer_range: [0, 1], parameters: {weight: [0.25, 0.75], density: 0.5}}
              - {model: $base, layer_range: [0, 1]}
          - sources:
              - {model: $base, layer_range: [0, 3]}
              - {model: $chat, layer_range: [0, 3], parameters: {weight: 0.9, density: [0.2, 0.4, 0.9]}}
              - {model: $math, layer_range: [1, 4], parameters: {weight: 0.4, density: 0.7}}
          - sources:
              - {model: $code, layer_range: [2, 4], parameters: {weight: [0.15, 0.35], density: 0.15}}
              - {model: $base, layer_range: [2, 4]}
        """,
    "passthrough": "{merge_method: passthrough, models: [{model: $code}]}",
    "passthrough-scaled": """
        merge_method: passthrough
        models:
          - model: $code
            parameters: {scale: [{filter: o_proj, value: [0.5, 1.5]}, {filter: down_proj, value: 0.7},
                {value: 1.0}]}
        """,
    "passthrough-deeper": """
        merge_method: passthrough
        base_model: $base
        slices:
          - sources: [{model: $math, layer_range: [0, 3]}]
          - sources: [{model: $code, layer_range: [1, 4], parameters: {scale: [{filter: o_proj,
              value: 0}, {filter: down_proj, value: 0}]}}]
          - sources: [{model: $math, layer_range: [2, 3], parameters: {scale: [0.3, 0.8]}}]
          - sources: [{model: $chat, layer_range: [3, 4]}]
        """,
    "passthrough-shallower": """
        merge_method: passthrough
        slices:
          - sources: [{model: $base, layer_range: [0, 1]}]
          - sources: [{model: $base, layer_range: [3, 4]}]
        """,
    "booleans-and-exponents": """
        merge_method: task_arithmetic
        base_model: $base
        models: [{model: $math, parameters: {weight: true}}, {model: $code,
            parameters: {weight: 2.5e-1}}, {model: $chat, parameters: {weight: 5e-2}}]
        parameters: {normalize: 0}
        tokenizer_source: base
        """,
}
CORNERS = {
    "dtype-alone": "{dtype: float32, merge_method: passthrough, models: [{model: $math}]}",
    "no-dtype": (
        "{merge_method: linear, models: [{model: $math}, {model: $code}], base_model: $math, "
        "parameters: {weight: 0.5}}"
    ),
    "no-dtype-float16": (
        "{out_dtype: float16, merge_method: slerp, models: [{model: $math}], base_model: $base, "
        "parameters: {t: 0.4}}"
    ),
    "linear-base-not-among-the-models": """
        dtype: float32
        merge_method: linear
        base_model: $base
        models: [{model: $math, parameters: {weight: 0.3}}, {model: $code}]
        parameters: {weight: 0.5}
        """,
    "gradient-of-switches": """
        dtype: float32
        merge_method: ties
        base_model: $base
        models: [{model: $math, parameters: {weight: 0.3, density: 0.5}}, {model: $code,
            parameters: {weight: 0.5, density: 0.5}}]
        parameters: {normalize: [false, true]}
        """,
    "one-source-after-a-slice-of-two": """
        dtype: float32
        merge_method: linear
        base_model: $base
        slices:
          - sources: [{model: $code, layer_range: [2, 4], parameters: {weight: 0.7}}, {model: $chat,
              layer_range: [2, 4], parameters: {weight: 0.2}}]
          - sources: [{model: $math, layer_range: [0, 2], parameters: {weight: 0.7}}]
        """,
    "one-layer-slices-take-the-end-of-a-gradient": """
        dtype: float32
        merge_method: task_arithmetic
        base_model: $base
        slices:
          - sources: [{model: $base, layer_range: [1, 2]}, {model: $math, layer_range: [0, 1],
              parameters: {weight: [0.2, 0.9]}}]
        """,
    "a-star-in-the-middle": """
        dtype: float32
        merge_method: task_arithmetic
        base_model: $base
        models:
          - {model: $math, parameters: {weight: [{filter: mlp, value: 0.3}, {filter: "*", value: 0.6},
              {filter: attn, value: 0.9}]}}
          - {model: $code, parameters: {weight: [{filter: "", value: 0.2}, {filter: attn, value: 0.9}]}}
        parameters: {weight: 5}
        """,
}
DARE = {
    "dare_linear": """
        dtype: float32
        merge_method: dare_linear
        base_model: $base
        models: [{model: $math, parameters: {weight: 0.7, density: 0.4}}, {model: $code,
            parameters: {weight: 0.5, density: 0.7}}]
        """,
    "dare_ties": """
        dtype: float32
        merge_method: dare_ties
        base_model: $base
        models: [{model: $math, parameters: {weight: 0.7, density: 0.4}}, {model: $code,
            parameters: {weight: 0.5, density: 0.7}}]
        """,
}


def block(text: str) -> str:
    """The text without the indentation of the table it stands in; a mapping in braces as a block of lines."""
    text = textwrap.dedent(text).strip() + "\n"
    return (
        yaml.dump(yaml.safe_load(text.replace("$", "__")), sort_keys=False).replace("__", "$")
        if text.startswith("{")
        else text
    )
