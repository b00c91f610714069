// ggml checks shapes when a node is built, but types and strides mostly when it computes: by an assert on a worker
// thread, which ends the process, or by plain assert(), which a release build leaves out and computes nonsense. These
// are the same conditions, in a table, asked when the node is built. They are those of the CPU kernels, which take more
// than any other backend's; whether the graph's own backend takes a node is asked when the graph is allocated.

#include "check.h"

#include <stdbool.h>
#include <string.h>

enum {
    F32  = 1 << 0,
    F16  = 1 << 1,
    BF16 = 1 << 2,
    I32  = 1 << 3,
    I64  = 1 << 4,
    I16  = 1 << 5,
    I8   = 1 << 6,
    Q    = 1 << 7,  // quantised types with a kernel that turns them into f32
    REST = 1 << 8,
    FLOAT = F32 | F16 | BF16,
    ANY   = (1 << 9) - 1,
};

enum layout {
    STRIDED,  // any strides
    ROWS,     // elements of a row side by side
    PLANES,   // rows anywhere, the other dimensions in order (ggml_is_contiguous_1)
    DENSE,    // contiguous
};

struct rule {
    int         types[3];    // of the first three sources; 0 means the rest of the row is unchecked
    enum layout layouts[3];
};

static const struct rule rules[GGML_OP_COUNT] = {
    [GGML_OP_ADD] = { { FLOAT | Q, FLOAT, 0 },  { ROWS, STRIDED, 0 } },
    [GGML_OP_SUB] = { { FLOAT, FLOAT, 0 },      { ROWS, STRIDED, 0 } },
    [GGML_OP_MUL] = { { FLOAT, FLOAT, 0 },      { ROWS, STRIDED, 0 } },
    [GGML_OP_DIV] = { { FLOAT, FLOAT, 0 },      { ROWS, STRIDED, 0 } },
    [GGML_OP_ADD_ID] = { { F32, F32, I32 },        { ROWS, ROWS, STRIDED } },
    [GGML_OP_ACC] = { { F32, F32, 0 },          { DENSE, ROWS, 0 } },
    [GGML_OP_SQR] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_SQRT] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_LOG] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_SIN] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_COS] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_SUM] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_SUM_ROWS] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_CUMSUM] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_MEAN] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_ARGMAX] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_COUNT_EQUAL] = { { I32, I32, 0 },          { STRIDED, STRIDED, 0 } },
    [GGML_OP_REPEAT] = { { FLOAT | I32 | I16, 0, 0 }, { ROWS, 0, 0 } },
    [GGML_OP_REPEAT_BACK] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_SILU_BACK] = { { F32 | F16, F32 | F16, 0 }, { PLANES, PLANES, 0 } },
    [GGML_OP_NORM] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_RMS_NORM] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_RMS_NORM_BACK] = { { F32, F32, 0 },          { ROWS, ROWS, 0 } },
    [GGML_OP_GROUP_NORM] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_L2_NORM] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_MUL_MAT] = { { FLOAT | Q, FLOAT, 0 },  { ROWS, ROWS, 0 } },
    [GGML_OP_MUL_MAT_ID] = { { FLOAT | Q, F32, I32 },  { ROWS, ROWS, STRIDED } },
    [GGML_OP_OUT_PROD] = { { F32 | F16 | Q, F32, 0 }, { ROWS, STRIDED, 0 } },
    [GGML_OP_SCALE] = { { F32 | BF16, 0, 0 },     { DENSE, 0, 0 } },
    [GGML_OP_SET] = { { F32 | I32, F32 | I32, 0 }, { DENSE, ROWS, 0 } },
    [GGML_OP_GET_ROWS] = { { FLOAT | I32 | Q, I32, 0 }, { ROWS, STRIDED, 0 } },
    [GGML_OP_GET_ROWS_BACK] = { { F32 | F16, I32, 0 },    { ROWS, DENSE, 0 } },
    [GGML_OP_DIAG] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_DIAG_MASK_INF] = { { F32, 0, 0 },            { DENSE, 0, 0 } },
    [GGML_OP_DIAG_MASK_ZERO] = { { F32, 0, 0 },            { DENSE, 0, 0 } },
    [GGML_OP_SOFT_MAX] = { { F32, F32 | F16, F32 },  { DENSE, DENSE, DENSE } },
    [GGML_OP_SOFT_MAX_BACK] = { { F32, F32, 0 },          { DENSE, DENSE, 0 } },
    [GGML_OP_ROPE] = { { F32 | F16, I32, F32 },  { ROWS, DENSE, DENSE } },
    [GGML_OP_ROPE_BACK] = { { F32 | F16, I32, F32 },  { ROWS, DENSE, DENSE } },
    [GGML_OP_CLAMP] = { { F32 | F16, 0, 0 },      { ROWS, 0, 0 } },
    [GGML_OP_CONV_TRANSPOSE_1D] = { { F32 | F16, F32, 0 },   { DENSE, DENSE, 0 } },
    [GGML_OP_IM2COL] = { { ANY, F32 | F16, 0 },    { STRIDED, ROWS, 0 } },
    [GGML_OP_IM2COL_BACK] = { { F32, F32 | F16, 0 },    { ROWS, STRIDED, 0 } },
    [GGML_OP_IM2COL_3D] = { { ANY, F32, 0 },          { STRIDED, ROWS, 0 } },
    [GGML_OP_COL2IM_1D] = { { FLOAT, 0, 0 },          { DENSE, 0, 0 } },
    [GGML_OP_CONV_2D] = { { F32 | F16, F32, 0 },    { DENSE, DENSE, 0 } },
    [GGML_OP_CONV_3D] = { { F32 | F16, F32, 0 },    { DENSE, DENSE, 0 } },
    [GGML_OP_CONV_2D_DW] = { { F32 | F16, F32, 0 },    { STRIDED, STRIDED, 0 } },
    [GGML_OP_CONV_TRANSPOSE_2D] = { { F32 | F16, F32, 0 },   { DENSE, DENSE, 0 } },
    [GGML_OP_POOL_1D] = { { F32 | F16, 0, 0 },      { DENSE, 0, 0 } },
    [GGML_OP_POOL_2D] = { { F32 | F16, 0, 0 },      { DENSE, 0, 0 } },
    [GGML_OP_POOL_2D_BACK] = { { F32, F32, 0 },          { DENSE, DENSE, 0 } },
    [GGML_OP_UPSCALE] = { { F32, 0, 0 },            { STRIDED, 0, 0 } },
    [GGML_OP_PAD] = { { F32, 0, 0 },            { STRIDED, 0, 0 } },
    [GGML_OP_PAD_REFLECT_1D] = { { F32, 0, 0 },            { DENSE, 0, 0 } },
    [GGML_OP_ROLL] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_TIMESTEP_EMBEDDING] = { { F32, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_ARGSORT] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_TOP_K] = { { F32, 0, 0 },            { ROWS, 0, 0 } },
    [GGML_OP_LEAKY_RELU] = { { F32 | F16, 0, 0 },      { PLANES, 0, 0 } },
    [GGML_OP_TRI] = { { F32, 0, 0 },            { DENSE, 0, 0 } },
    [GGML_OP_FILL] = { { F32 | F16, 0, 0 },      { DENSE, 0, 0 } },
    [GGML_OP_FLASH_ATTN_EXT] = { { F32, FLOAT | Q, FLOAT | Q }, { ROWS, ROWS, ROWS } },
    [GGML_OP_SSM_CONV] = { { F32, F32, 0 },          { DENSE, DENSE, 0 } },
    [GGML_OP_SSM_SCAN] = { { F32, F32, F32 },        { DENSE, ROWS, DENSE } },
    [GGML_OP_WIN_PART] = { { F32, 0, 0 },            { DENSE, 0, 0 } },
    [GGML_OP_WIN_UNPART] = { { F32, 0, 0 },            { DENSE, 0, 0 } },
    [GGML_OP_GET_REL_POS] = { { F16 | BF16, 0, 0 },     { DENSE, 0, 0 } },
    [GGML_OP_ADD_REL_POS] = { { F32, F32, F32 },        { DENSE, DENSE, DENSE } },
    [GGML_OP_RWKV_WKV6] = { { F32, F32, F32 },        { DENSE, DENSE, DENSE } },
    [GGML_OP_GATED_LINEAR_ATTN] = { { F32, F32, F32 },       { DENSE, DENSE, DENSE } },
    [GGML_OP_RWKV_WKV7] = { { F32, F32, F32 },        { DENSE, DENSE, DENSE } },
    [GGML_OP_SOLVE_TRI] = { { F32, F32, 0 },          { DENSE, DENSE, 0 } },
    [GGML_OP_GATED_DELTA_NET] = { { F32, F32, F32 },        { ROWS, ROWS, ROWS } },
    [GGML_OP_LIGHTNING_INDEXER] = { { F32, FLOAT | Q, F32 }, { ROWS, ROWS, ROWS } },
    [GGML_OP_DSV4_HC_COMB] = { { F32, F32, F32 },        { ROWS, ROWS, ROWS } },
    [GGML_OP_DSV4_HC_PRE] = { { F32, F32, 0 },          { ROWS, ROWS, 0 } },
    [GGML_OP_DSV4_HC_POST] = { { F32, F32, F32 },        { ROWS, ROWS, ROWS } },
    [GGML_OP_UNARY] = { { FLOAT, 0, 0 },          { ROWS, 0, 0 } },
    [GGML_OP_GLU] = { { FLOAT, FLOAT, 0 },      { PLANES, PLANES, 0 } },
    [GGML_OP_CROSS_ENTROPY_LOSS] = { { F32, F32, 0 },        { DENSE, DENSE, 0 } },
    [GGML_OP_CROSS_ENTROPY_LOSS_BACK] = { { F32, F32, F32 }, { DENSE, DENSE, DENSE } },
    [GGML_OP_OPT_STEP_ADAMW] = { { F32, F32, F32 },        { DENSE, DENSE, DENSE } },
    [GGML_OP_OPT_STEP_SGD] = { { F32, F32, F32 },        { DENSE, DENSE, DENSE } },
};

static int type_bit(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:  return F32;
        case GGML_TYPE_F16:  return F16;
        case GGML_TYPE_BF16: return BF16;
        case GGML_TYPE_I32:  return I32;
        case GGML_TYPE_I64:  return I64;
        case GGML_TYPE_I16:  return I16;
        case GGML_TYPE_I8:   return I8;
        default: return ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float ? Q : REST;
    }
}

// Quantised types that a row of f32 can be turned into on the fly.
static bool can_quantize(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_IQ3_XXS: case GGML_TYPE_IQ3_S: case GGML_TYPE_IQ2_XXS: case GGML_TYPE_IQ2_XS:
        case GGML_TYPE_IQ2_S: case GGML_TYPE_IQ1_S: case GGML_TYPE_IQ1_M:
            return false;
        default:
            return type_bit(type) == Q;
    }
}

static const char * wrong_layout(const struct ggml_tensor * t, enum layout layout, int i) {
    static const char * const rows[]   = { "the rows of the first argument to be contiguous: use cont() before",
                                           "the rows of the second argument to be contiguous: use cont() before",
                                           "the rows of the third argument to be contiguous: use cont() before" };
    static const char * const dense[]  = { "the first argument to be contiguous: use cont() before",
                                           "the second argument to be contiguous: use cont() before",
                                           "the third argument to be contiguous: use cont() before" };
    switch (layout) {
        case ROWS:   return ggml_is_contiguous_rows(t) ? NULL : rows[i];
        case PLANES: return ggml_is_contiguous_1(t) ? NULL : dense[i];
        case DENSE:  return ggml_is_contiguous(t) ? NULL : dense[i];
        default:     return NULL;
    }
}

static const char * why_not_copy(const struct ggml_tensor * from, const struct ggml_tensor * to) {
    const int a = type_bit(from->type), b = type_bit(to->type);
    if (from->type == to->type) {
        if (ggml_blck_size(from->type) > 1 && !(ggml_is_contiguous(to) && ggml_is_contiguous_rows(from)) &&
            !(ggml_are_same_shape(from, to) && ggml_is_contiguous_rows(from) && ggml_is_contiguous_rows(to))) {
            return "rows of blocks to stay rows: such a copy takes blocks apart";
        }
        // One path of ggml copies ne0 whole blocks, not elements, for each row of a strided quantised source.
        if (ggml_blck_size(from->type) > 1 && !ggml_are_same_shape(from, to) && !ggml_is_contiguous(from)) {
            return "a contiguous source for a copy of quantised data into another shape";
        }
        return NULL;
    }
    if (a & FLOAT) {
        if (b & FLOAT || (a == F32 && b == I32)) {
            return NULL;
        }
        if (b == Q) {
            if (!can_quantize(to->type)) {
                return "a type that rows are quantised to on the fly, not one that needs an importance matrix";
            }
            if (!ggml_is_contiguous(to) || !ggml_is_contiguous_rows(from)) {
                return "a contiguous target and contiguous rows to quantise";
            }
            return from->ne[0] == to->ne[0] ? NULL : "rows of equal length to quantise";
        }
    } else if (a == I32 && b == F32) {
        return NULL;
    } else if (a == Q && b == F32) {
        if (!ggml_is_contiguous_rows(from) || !ggml_is_contiguous(to)) {
            return "contiguous rows of blocks and a contiguous target";
        }
        return NULL;
    }
    return "types that convert: f32, f16, bf16 into each other and into quantised ones; i32 and f32; quantised into f32";
}

const char * pyggml_why_not(const struct ggml_tensor * node) {
    const struct ggml_tensor * a = node->src[0];
    const struct ggml_tensor * b = node->src[1];

    for (int i = 0; i < GGML_MAX_DIMS; i++) {
        if (node->ne[i] < 0) {
            return "sizes of 0 and more";
        }
    }
    if (node->ne[0] % ggml_blck_size(node->type) != 0) {
        return "rows of whole blocks";
    }
    const struct rule * rule = &rules[node->op];
    for (int i = 0; i < 3 && rule->types[i]; i++) {
        const struct ggml_tensor * t = node->src[i];
        if (!t) {
            continue;
        }
        if (!(rule->types[i] & type_bit(t->type))) {
            static const char * const wrong[] = { "another type for the first argument", "another type for the second argument",
                                                  "another type for the third argument" };
            return wrong[i];
        }
        const char * why = wrong_layout(t, rule->layouts[i], i);
        if (why) {
            return why;
        }
    }

    switch (node->op) {
        case GGML_OP_DUP:
        case GGML_OP_CPY:
        case GGML_OP_CONT:
            return why_not_copy(a, node);
        case GGML_OP_VIEW:
            if (node->view_src && node->view_offs + ggml_nbytes(node) > ggml_nbytes(node->view_src)) {
                return "a view that ends within its tensor's data";
            }
            return NULL;
        case GGML_OP_ADD:
            if (type_bit(a->type) == Q) {
                if (b->type != GGML_TYPE_F32 || !ggml_are_same_shape(a, b) || !ggml_is_contiguous_rows(b) ||
                    a->nb[1] > a->nb[2] || a->nb[2] > a->nb[3]) {
                    return "an f32 second argument of the same shape beside a quantised first one";
                }
                return node->type == GGML_TYPE_F32 || can_quantize(node->type) ? NULL
                           : "a type that rows are quantised to on the fly";
            }
            // fall through
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            if (b->type != GGML_TYPE_F32 && b->type != a->type) {
                return "a second argument of f32 or of the first one's type";
            }
            return node->type == a->type || (b->type == GGML_TYPE_F32 && node->type == GGML_TYPE_F32)
                       ? NULL : "a result of f32 or of the first argument's type";
        case GGML_OP_ACC:
        case GGML_OP_SET:
            {
                int64_t last = 0;  // byte offset of b's last element, as the kernels reckon it
                const int64_t nb[4] = { (int64_t) ggml_element_size(a), node->op_params[0], node->op_params[1], node->op_params[2] };
                for (int i = 0; i < 4; i++) {
                    last += (b->ne[i] > 0 ? b->ne[i] - 1 : 0) * nb[i];
                }
                if (a->type != b->type) {
                    return "arguments of one type";
                }
                return node->op_params[3] >= 0 && node->op_params[3] + last + nb[0] <= (int64_t) ggml_nbytes(a)
                           ? NULL : "the second argument to end within the first one's data";
            }
        case GGML_OP_CONCAT:
            // Types without a kernel of their own are copied by rows of whole blocks.
            if (type_bit(a->type) & (Q | REST | I64)) {
                if (!ggml_is_contiguous_rows(a) || !ggml_is_contiguous_rows(b)) {
                    return "contiguous rows for this type: use cont() before";
                }
            }
            return NULL;
        case GGML_OP_UNARY:
            return node->op_params[0] == GGML_UNARY_OP_XIELU ? wrong_layout(a, PLANES, 0) : NULL;
        case GGML_OP_MUL_MAT:
            if (b->type != GGML_TYPE_F32 && b->type != a->type) {
                return "a second argument of f32 or of the first one's type";
            }
            return NULL;
        case GGML_OP_OUT_PROD:
            if (a->type != GGML_TYPE_F32 && (a->ne[2] != b->ne[2] || a->ne[3] != b->ne[3])) {
                return "equal batches where the first argument is not f32";
            }
            return NULL;
        case GGML_OP_SET_ROWS:
            {
                // node->src: rows, ids, target; the node is a view of the target
                if (a->type != GGML_TYPE_F32 && !(a->type == GGML_TYPE_F16 && node->type == GGML_TYPE_F16)) {
                    return "rows of f32";
                }
                if (b->type != GGML_TYPE_I64 && b->type != GGML_TYPE_I32) {
                    return "row numbers of i64 or i32";
                }
                if (!(type_bit(node->type) & FLOAT) && !can_quantize(node->type)) {
                    return "a target of f32, f16, bf16 or a type that rows are quantised to on the fly";
                }
                return wrong_layout(a, ROWS, 1);
            }
        case GGML_OP_SILU_BACK:
        case GGML_OP_RMS_NORM_BACK:
            if (!ggml_are_same_shape(a, b) || a->type != b->type) {
                return "arguments of one shape and type";
            }
            return NULL;
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
            {
                float eps;
                memcpy(&eps, node->op_params, sizeof(eps));
                return eps >= 0.0f ? NULL : "an eps of 0 and more";
            }
        case GGML_OP_GLU:
            if (!b && a->ne[0] % 2 != 0) {
                return "rows of two halves";
            }
            if ((node->op_params[0] == GGML_GLU_OP_SWIGLU_OAI && a->type != GGML_TYPE_F32) ||
                (node->op_params[0] == GGML_GLU_OP_SWIGLU_CLAMP && a->type == GGML_TYPE_BF16)) {
                return "f32";
            }
            return NULL;
        case GGML_OP_GROUP_NORM:
            return node->op_params[0] >= 1 ? NULL : "at least one group";
        case GGML_OP_DIAG_MASK_INF:
        case GGML_OP_DIAG_MASK_ZERO:
            return node->op_params[0] >= 0 ? NULL : "n_past of 0 and more";
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK:
            {
                const int32_t n_dims = node->op_params[1], mode = node->op_params[2];
                int32_t       sections[4];
                memcpy(sections, node->op_params + 11, sizeof(sections));
                const bool multi = (mode & GGML_ROPE_TYPE_MROPE) != 0;
                if (n_dims <= 0 || n_dims % 2 || n_dims > a->ne[0]) {
                    return "an even n_dims, at most the head's size";
                }
                if (mode != GGML_ROPE_TYPE_NORMAL && mode != GGML_ROPE_TYPE_NEOX && mode != GGML_ROPE_TYPE_MROPE &&
                    mode != GGML_ROPE_TYPE_VISION && mode != GGML_ROPE_TYPE_IMROPE) {
                    return "a mode that it knows";
                }
                if (multi) {
                    if (sections[0] <= 0 && sections[1] <= 0 && sections[2] <= 0) {
                        return "sections of more than 0 pairs";
                    }
                    if ((int64_t) sections[0] + sections[1] + sections[2] + sections[3] > a->ne[0]) {
                        return "sections that fit into the head";
                    }
                }
                if (mode == GGML_ROPE_TYPE_VISION && n_dims != a->ne[0] / 2) {
                    return "n_dims of half the head's size";
                }
                if (node->src[2] && node->src[2]->ne[0] < n_dims / 2) {
                    return "a frequency factor for each pair";
                }
                return NULL;
            }
        case GGML_OP_SOFT_MAX_BACK:
            {
                float max_bias;
                memcpy(&max_bias, node->op_params + 1, sizeof(float));
                return max_bias == 0.0f ? NULL : "max_bias of 0";
            }
        case GGML_OP_FLASH_ATTN_EXT:
            {
                const struct ggml_tensor * v = node->src[2];
                const struct ggml_tensor * mask = node->src[3];
                if (v->ne[1] != b->ne[1] || v->ne[2] != b->ne[2]) {
                    return "as many values as keys";
                }
                if (mask && (mask->ne[0] < b->ne[1] || mask->ne[1] < a->ne[1])) {
                    return "a mask of [n_kv, n_q]";
                }
                return NULL;
            }
        case GGML_OP_IM2COL:
            if (node->type != GGML_TYPE_F32 && node->type != GGML_TYPE_F16) {
                return "a result of f32 or f16";
            }
            if (node->type == GGML_TYPE_F32 && b->type != GGML_TYPE_F32) {
                return "an f32 image for an f32 result";
            }
            return NULL;
        case GGML_OP_IM2COL_3D:
            return node->type == GGML_TYPE_F32 || node->type == GGML_TYPE_F16 ? NULL : "a result of f32 or f16";
        case GGML_OP_CONV_2D:
            return a->ne[2] == b->ne[2] ? NULL : "as many channels in the image as in the kernel";
        case GGML_OP_CONV_2D_DW:
            if (!ggml_is_contiguous(b) && !ggml_is_contiguous_channels(b)) {
                return "an image that is contiguous, or contiguous by channels";
            }
            if (ggml_is_contiguous(b) && (!ggml_is_contiguous(a) || (a->type != GGML_TYPE_F32 && a->type != GGML_TYPE_F16))) {
                return "a contiguous kernel of f32 or f16";
            }
            return NULL;
        case GGML_OP_SSM_SCAN:
            for (int i = 3; i < 6; i++) {
                if (node->src[i]->type != GGML_TYPE_F32) {
                    return "f32 in all arguments but the last";
                }
            }
            return node->src[4]->ne[1] > 0 && node->src[1]->ne[1] % node->src[4]->ne[1] == 0 ? NULL : "groups that divide the heads";
        case GGML_OP_RWKV_WKV6:
        case GGML_OP_RWKV_WKV7:
        case GGML_OP_GATED_LINEAR_ATTN:
            for (int i = 3; i < 7; i++) {
                if (node->src[i] && node->src[i]->type != GGML_TYPE_F32) {
                    return "f32 in all arguments";
                }
            }
            {
                // Written for heads of 64: the kernel of RWKV-7 takes whole vectors only and would run past the end.
                const struct ggml_tensor * state  = node->src[node->op == GGML_OP_RWKV_WKV7 ? 6 : node->op == GGML_OP_RWKV_WKV6 ? 5 : 4];
                const int64_t              tokens = b->ne[2], seqs = state->ne[1];
                if (node->op == GGML_OP_RWKV_WKV7 && b->ne[0] % 64 != 0) {
                    return "heads of a multiple of 64";
                }
                if (node->op == GGML_OP_RWKV_WKV6 && ggml_nelements(node->src[3]) != b->ne[0] * b->ne[1]) {
                    return "one `first` for each channel";
                }
                return seqs > 0 && tokens % seqs == 0 ? NULL : "as many tokens for each sequence";
            }
        case GGML_OP_OPT_STEP_ADAMW:
            if (node->src[3]->type != GGML_TYPE_F32 || !ggml_is_contiguous(node->src[3])) {
                return "f32 in all arguments";
            }
            return NULL;
        default:
            return NULL;
    }
}

bool pyggml_is_repacked(const struct ggml_tensor * tensor) {
    if (!tensor->buffer || ggml_backend_buffer_is_host(tensor->buffer)) {
        return false;
    }
    ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return device && ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

int pyggml_first_refused(ggml_backend_t backend, struct ggml_cgraph * graph, const char ** why) {
    const int n = ggml_graph_n_nodes(graph);
    struct ggml_tensor ** nodes = ggml_graph_nodes(graph);
    for (int i = 0; i < n; i++) {
        *why = pyggml_why_not(nodes[i]);
        if (!*why && nodes[i]->view_src && pyggml_is_repacked(nodes[i]->view_src)) {
            *why = "weights as the file has them, but these are repacked";
        }
        if (*why || !ggml_backend_supports_op(backend, nodes[i])) {
            return i;
        }
    }
    return -1;
}

static bool only_looks(const struct ggml_tensor * node) {
    return node->op == GGML_OP_NONE || node->op == GGML_OP_VIEW || node->op == GGML_OP_RESHAPE ||
           node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
}

int pyggml_first_write(struct ggml_cgraph * graph, ggml_backend_buffer_t buffer) {
    const int n = ggml_graph_n_nodes(graph);
    struct ggml_tensor ** nodes = ggml_graph_nodes(graph);
    for (int i = 0; i < n; i++) {
        if (nodes[i]->view_src && nodes[i]->view_src->buffer == buffer && !only_looks(nodes[i])) {
            return i;
        }
    }
    return -1;
}

// True when every number in `ids` is one of `rows` rows; otherwise *value is the first that is not.
static bool within(const struct ggml_tensor * ids, int64_t rows, int64_t * value) {
    for (int64_t i3 = 0; i3 < ids->ne[3]; i3++) {
        for (int64_t i2 = 0; i2 < ids->ne[2]; i2++) {
            for (int64_t i1 = 0; i1 < ids->ne[1]; i1++) {
                const char * row = (const char *) ids->data + i1 * ids->nb[1] + i2 * ids->nb[2] + i3 * ids->nb[3];
                for (int64_t i0 = 0; i0 < ids->ne[0]; i0++) {
                    const char * at = row + i0 * ids->nb[0];
                    *value = ids->type == GGML_TYPE_I64 ? *(const int64_t *) at : *(const int32_t *) at;
                    if (*value < 0 || *value >= rows) {
                        return false;
                    }
                }
            }
        }
    }
    return true;
}

int pyggml_first_bad_row(struct ggml_cgraph * graph, int64_t * value, int64_t * n_rows) {
    const int n = ggml_graph_n_nodes(graph);
    struct ggml_tensor ** nodes = ggml_graph_nodes(graph);
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor * node = nodes[i];
        const struct ggml_tensor * ids  = NULL;
        switch (node->op) {
            case GGML_OP_GET_ROWS:      ids = node->src[1]; *n_rows = node->src[0]->ne[1]; break;
            case GGML_OP_GET_ROWS_BACK:
            case GGML_OP_SET_ROWS:      ids = node->src[1]; *n_rows = node->ne[1]; break;
            case GGML_OP_ADD_ID:        ids = node->src[2]; *n_rows = node->src[1]->ne[1]; break;
            case GGML_OP_MUL_MAT_ID:    ids = node->src[2]; *n_rows = node->src[0]->ne[2]; break;
            case GGML_OP_SSM_SCAN:      ids = node->src[6]; *n_rows = node->src[0]->ne[3]; break;
            default: continue;
        }
        // Numbers that the graph itself computes are not known yet.
        const struct ggml_tensor * root = ids->view_src ? ids->view_src : ids;
        if (root->op != GGML_OP_NONE || !ids->data || !root->buffer || !ggml_backend_buffer_is_host(root->buffer)) {
            continue;
        }
        if (!within(ids, *n_rows, value)) {
            return i;
        }
    }
    return -1;
}
