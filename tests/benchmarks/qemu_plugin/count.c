/* A plugin of qemu-user 7 that counts the AArch64 or x86-64 instructions a program executes, by class, and writes them
 * as one JSON object when it exits: qemu-aarch64 -plugin libcount.so,out=FILE PROGRAM. Build it with
 * cc -shared -fPIC -O2. Counters are not locked: run the program with one thread.
 *
 * No distribution packages qemu-plugin.h, so the few declarations needed of its API, version 1, stand here. Source:
 * https://gitlab.com/qemu-project/qemu/-/blob/v7.2.0/include/qemu/qemu-plugin.h */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t qemu_plugin_id_t;
struct qemu_info {
    const char *target_name;
    int version_min, version_cur;
};
struct tb;
struct insn;
enum { INLINE_ADD_U64 = 0 };
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct tb *, int op, void *counter, uint64_t value);
extern void qemu_plugin_register_atexit_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *);
extern size_t qemu_plugin_tb_n_insns(const struct tb *);
extern struct insn *qemu_plugin_tb_get_insn(const struct tb *, size_t index);
extern const void *qemu_plugin_insn_data(const struct insn *);

EXPORT int qemu_plugin_version = 1;

enum class { TOTAL, DOT, MULTIPLY, VECTOR_OTHER, LOAD, STORE, BRANCH, SCALAR, CLASSES };
static const char *const names[CLASSES] = {"total", "dot", "multiply", "vector_other",
                                           "load",  "store", "branch",  "scalar"};
static uint64_t counts[CLASSES];
static char path[4096];
static int aarch64;

/* The top-level encodings of the Arm Architecture Reference Manual, C4.1. */
static enum class classify(uint32_t code)
{
    uint32_t op0 = code >> 25 & 15;
    if ((op0 & 5) == 4) /* loads and stores */
    {
        if ((code >> 24 & 0x3b) == 0x18)
            return LOAD; /* literal */
        if ((code & 0x3a000000) == 0x28000000 || (code & 0xbe000000) == 0x0c000000)
            return code >> 22 & 1 ? LOAD : STORE; /* pairs and structures */
        if (code >> 26 & 1) /* vector registers: opc<1> is a part of the size of 128 bits */
            return code >> 22 & 1 ? LOAD : STORE;
        return code >> 22 & 3 ? LOAD : STORE;
    }
    if ((op0 & 14) == 10)
        return BRANCH;
    if ((op0 & 7) != 7)
        return SCALAR;
    if ((code & 0x9f20fc00) == 0x0e009400 && (code >> 22 & 3) == 2)
        return DOT; /* sdot, udot, vectors */
    if ((code & 0x9f00f400) == 0x0f00e000 && (code >> 22 & 3) == 2)
        return DOT; /* sdot, udot, by element */
    if ((code & 0xdfe0f400) == 0x4e80a400)
        return DOT; /* smmla, ummla, usmmla */
    uint32_t opcode = code >> 12 & 15;
    if ((code & 0x9f200c00) == 0x0e200000 && (opcode >= 8 && opcode <= 13))
        return MULTIPLY; /* (u|s)mull, mlal, mlsl of three different vectors */
    if ((code & 0x9f000400) == 0x0f000000 && (opcode & 3) != 1 && (opcode & 3) != 3)
        return MULTIPLY; /* by element */
    return VECTOR_OTHER;
}

static void translate(qemu_plugin_id_t id, struct tb *tb)
{
    (void)id;
    uint64_t found[CLASSES] = {0};
    size_t count = qemu_plugin_tb_n_insns(tb);
    found[TOTAL] = count;
    for (size_t i = 0; aarch64 && i < count; i++) {
        uint32_t code;
        memcpy(&code, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof code);
        found[classify(code)]++;
    }
    for (int c = 0; c < CLASSES; c++)
        if (found[c] > 0)
            qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD_U64, &counts[c], found[c]);
}

static void finish(qemu_plugin_id_t id, void *unused)
{
    (void)id, (void)unused;
    FILE *file = path[0] != 0 ? fopen(path, "w") : stderr;
    if (file == NULL)
        return;
    for (int c = 0; c < CLASSES; c++)
        fprintf(file, "%s\"%s\": %" PRIu64, c == 0 ? "{" : ", ", names[c], counts[c]);
    fputs("}\n", file);
    if (file != stderr)
        fclose(file);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int argc, char **argv)
{
    aarch64 = strcmp(info->target_name, "aarch64") == 0;
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], "out=", 4) == 0)
            snprintf(path, sizeof path, "%s", argv[i] + 4);
    qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
    qemu_plugin_register_atexit_cb(id, finish, NULL);
    return 0;
}
