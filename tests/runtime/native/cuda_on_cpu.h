// CUDA on a processor, for tests: the kernels' C++ source compiled after this header runs as the CUDA and PTX manuals
// say, a block at a time, every thread a fibre. It rehearses: results count, speed means nothing.
//
// What only a GPU would do by chance is done here at its worst: shared memory begins as rubbish, threads run in any
// order that is asked for, and an asynchronous copy arrives as early or as late as it may. A barrier that some threads
// miss, or operands of a warp's instruction that must agree and do not, end the launch with an error.
//
// Compiled with -fsanitize=thread it also counts what memory accesses of a launch's first block cost, and one beside the
// launch's operands is an error: the compiler then calls __tsan_read4 and the like before each access. No part of the
// sanitizer itself is linked.

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <tuple>
#include <vector>

#define XCT_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

// Moved as a whole, at an address that is a multiple of its size: so the accesses are seen.
struct int2 {
    typedef int Words __attribute__((vector_size(8)));
    union {
        Words words;
        struct {
            int x, y;
        };
    };
    int2(int x, int y) : words{x, y} {}
    int2(const int2& other) : words(other.words) {}
    int2& operator=(const int2& other) {
        words = other.words;
        return *this;
    }
};
struct int4 {
    typedef int Words __attribute__((vector_size(16)));
    union {
        Words words;
        struct {
            int x, y, z, w;
        };
    };
    int4(int x, int y, int z, int w) : words{x, y, z, w} {}
    int4(const int4& other) : words(other.words) {}
    int4& operator=(const int4& other) {
        words = other.words;
        return *this;
    }
};
struct Index {
    unsigned x, y, z;
};

static Index threadIdx, blockIdx;
// The dynamic shared memory, by the name that TVM gives it.
extern "C" {
alignas(64) signed char _ptr[64 << 10];
}

using std::max;
using std::min;

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline float __int2float_rn(int a) { return (float)a; }
static inline int __float_as_int(float a) {
    int b;
    std::memcpy(&b, &a, 4);
    return b;
}
static inline float __int_as_float(int a) {
    float b;
    std::memcpy(&b, &a, 4);
    return b;
}

// Fibres. A switch saves what the System V ABI says a function keeps.

extern "C" void fibre_switch(void** save, void* to);
asm(R"(
    .text
    .globl fibre_switch
    .type fibre_switch, @function
fibre_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// Accesses of the memories, for counting. One of a warp's is told from others by the places in the program that lead to
// it and how often its thread was there before.

enum Space { SHARED, GLOBAL };
typedef std::tuple<const void*, const void*, const void*> Place;

struct Access {
    Place place;
    const char* address;
    int bytes;
    Space space;
};

// What a warp's accesses of one space cost, and what they would at best: of shared memory wavefronts, in each of which
// every one of the 32 banks gives a word; of global memory sectors of 32 bytes.
struct Traffic {
    unsigned long long accesses, cost, least;
};

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

enum State { RUNNING, AT_BARRIER, IN_WARP, DONE };

struct Fibre {
    void* stack_pointer;
    char* stack;
    State state;
    std::vector<std::vector<Copy>> groups;  // committed, the oldest first
    std::vector<Copy> copies;               // not yet committed
    std::vector<Access> accesses;
};

// One instruction that the 32 threads of a warp execute together.
struct Collective {
    void (*execute)(struct Collective&);
    void* out[32];
    const void* in[32][2];
    int value[32];
    int arrived;
};

typedef void (*Kernel)(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                       void*, void*);

static const size_t STACK_BYTES = 128 << 10;
static std::vector<Fibre> fibres;
static Collective warps[32];
static unsigned current;
static void* scheduler;
static Kernel kernel;
static void* arguments[16];
static const char* failure;
static bool copies_are_early;
// What counts as global memory: pairs of where it begins and ends. Set before a launch that is to be counted.
extern "C" {
const char* global_memory[4];
long operand_bytes[16];
Traffic traffic[2];
}

static void fail(const char* message) {
    if (!failure) failure = message;
}

static void leave(State state) {
    fibres[current].state = state;
    fibre_switch(&fibres[current].stack_pointer, scheduler);
}

static void run_thread() {
    void** a = arguments;
    kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]);
    leave(DONE);
    std::abort();
}

static void prepare(Fibre& fibre) {
    void** top = (void**)(fibre.stack + STACK_BYTES - 64);
    *--top = nullptr;  // so that the stack is aligned as after a call
    *--top = (void*)run_thread;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fibre.stack_pointer = top;
    fibre.state = RUNNING;
    fibre.groups.clear();
    fibre.copies.clear();
}

typedef std::array<const Access*, 32> Lanes;  // NULL: has no part in it

// Shared memory serves 32 lanes at once, of 8 bytes each 16, of 16 bytes 8; in each turn with as many wavefronts as the
// busiest bank has different words to give.
static void count_shared(const Lanes& lanes, int bytes) {
    const int at_once = bytes <= 4 ? 32 : 128 / bytes;
    for (int first = 0; first < 32; first += at_once) {
        std::set<long> words;
        for (int lane = first; lane < first + at_once; lane++)
            for (int i = 0; lanes[lane] && i < bytes; i += 4)
                words.insert((lanes[lane]->address + i - (const char*)_ptr) / 4);
        if (words.empty()) continue;
        int banks[32] = {0};
        for (long word : words) banks[word % 32]++;
        traffic[SHARED].accesses++;
        traffic[SHARED].cost += *std::max_element(banks, banks + 32);
        traffic[SHARED].least += (words.size() + 31) / 32;
    }
}

static void count_global(const Lanes& lanes, int bytes) {
    std::set<uintptr_t> touched, sectors;
    for (const Access* access : lanes)
        for (int i = 0; access && i < bytes; i++) {
            const uintptr_t at = (uintptr_t)access->address + i;
            touched.insert(at), sectors.insert(at / 32);
        }
    traffic[GLOBAL].accesses++;
    traffic[GLOBAL].cost += sectors.size();
    traffic[GLOBAL].least += (touched.size() + 31) / 32;
}

static void count_accesses() {
    for (size_t warp = 0; warp < fibres.size(); warp += 32) {
        std::map<std::tuple<Place, Space, int, int>, Lanes> instructions;
        for (size_t lane = 0; lane < 32; lane++) {
            std::map<std::tuple<Place, Space, int>, int> seen;
            for (const Access& access : fibres[warp + lane].accesses) {
                const int turn = seen[{access.place, access.space, access.bytes}]++;
                instructions[{access.place, access.space, access.bytes, turn}][lane] = &access;
            }
        }
        for (const auto& [key, lanes] : instructions)
            (std::get<1>(key) == SHARED ? count_shared : count_global)(lanes, std::get<2>(key));
    }
    for (Fibre& fibre : fibres) fibre.accesses.clear();
}

static void run_block(const std::vector<unsigned>& order) {
    std::memset(_ptr, 0xA5, sizeof _ptr);
    for (Fibre& fibre : fibres) prepare(fibre);
    for (Collective& warp : warps) warp.arrived = 0;
    for (;;) {
        bool ran = false;
        for (unsigned i : order) {
            if (fibres[i].state != RUNNING) continue;
            ran = true;
            current = i;
            threadIdx = {i, 0, 0};
            fibre_switch(&scheduler, fibres[i].stack_pointer);
        }
        if (ran) continue;
        size_t done = 0, waiting = 0;
        for (const Fibre& fibre : fibres) done += fibre.state == DONE, waiting += fibre.state == AT_BARRIER;
        if (done == fibres.size()) return;
        if (waiting != fibres.size()) return fail("some threads wait where others never come");
        for (Fibre& fibre : fibres) fibre.state = RUNNING;
    }
}

// Runs a launch of blocks of `threads` threads; `seed` 0: in order, else some other order. NULL, or what went wrong.
extern "C" const char* emulate(void* function, void** pointers, int count, const unsigned* groups, unsigned threads,
                               unsigned seed, int early) {
    kernel = (Kernel)function;
    failure = nullptr;
    copies_are_early = early != 0;
    for (int i = 0; i < 16; i++) arguments[i] = i < count ? pointers[i] : nullptr;
    while (fibres.size() > threads) std::free(fibres.back().stack), fibres.pop_back();
    while (fibres.size() < threads) fibres.push_back({nullptr, (char*)std::aligned_alloc(64, STACK_BYTES), DONE, {}, {}});
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    for (unsigned i = threads; seed && i > 1; i--) {
        seed = seed * 1664525u + 1013904223u;
        std::swap(order[i - 1], order[(seed >> 8) % i]);
    }
    for (unsigned z = 0; z < groups[2]; z++)
        for (unsigned y = 0; y < groups[1]; y++)
            for (unsigned x = 0; x < groups[0] && !failure; x++) {
                blockIdx = {x, y, z};
                run_block(order);
                if (x + y + z == 0) count_accesses();
            }
    return failure;
}

#define UNSEEN __attribute__((no_sanitize("thread")))

UNSEEN static bool is_shared(const void* p) {
    return (const signed char*)p >= _ptr && (const signed char*)p < _ptr + sizeof _ptr;
}

UNSEEN static bool is_counted(const void* p) {
    const char* const at = (const char*)p;
    if (!global_memory[0] || blockIdx.x + blockIdx.y + blockIdx.z) return false;
    return is_shared(p) || (at >= global_memory[0] && at < global_memory[1]) ||
           (at >= global_memory[2] && at < global_memory[3]);
}

// Of the global memory a kernel may touch its operands alone.
UNSEEN static void check_global(const void* p, long bytes) {
    const char* const at = (const char*)p;
    bool is_global = false;
    for (int i = 0; i < 4; i += 2) is_global |= at >= global_memory[i] && at < global_memory[i + 1];
    for (int i = 0; i < 16 && is_global; i++) {
        const char* const operand = (const char*)arguments[i];
        if (at >= operand && at + bytes <= operand + operand_bytes[i]) return;
    }
    if (is_global) fail("an access beside the operands");
}

// Called by what the kernel calls, at most through xct_load16 and int4.
#define COUNT(p, bytes)                                                                                       \
    check_global(p, bytes);                                                                                   \
    if (is_counted(p))                                                                                        \
        fibres[current].accesses.push_back(                                                                   \
            {{__builtin_return_address(0), __builtin_return_address(1), __builtin_return_address(2)},         \
             (const char*)p, bytes, is_shared(p) ? SHARED : GLOBAL})

#define COUNTED(bytes)                                                                                        \
    extern "C" UNSEEN void __tsan_read##bytes(void* p) { COUNT(p, bytes); }                                   \
    extern "C" UNSEEN void __tsan_write##bytes(void* p) { COUNT(p, bytes); }
COUNTED(1)
COUNTED(2)
COUNTED(4)
COUNTED(8)
COUNTED(16)
extern "C" void __tsan_init() {}

static inline void xct_sync() { leave(AT_BARRIER); }

// The last thread of the warp to come executes the instruction for all.
static void together(void (*execute)(Collective&), void* out, const void* a, const void* b, int value) {
    Collective& warp = warps[current / 32];
    const unsigned lane = current % 32;
    if (warp.arrived && warp.execute != execute) fail("threads of a warp execute different instructions together");
    warp.execute = execute;
    warp.out[lane] = out, warp.in[lane][0] = a, warp.in[lane][1] = b, warp.value[lane] = value;
    if (++warp.arrived < 32) return leave(IN_WARP);
    execute(warp);
    warp.arrived = 0;
    for (unsigned i = current / 32 * 32; i < current / 32 * 32 + 32; i++) fibres[i].state = RUNNING;
}

static inline int xct_perm(int a, int b, int selector) {
    const uint64_t bytes = (uint64_t)(uint32_t)b << 32 | (uint32_t)a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return (int)result;
}

template <int table>
static inline int xct_lop3(int a, int b, int c) {
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (unsigned)(table >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) & 1) << i;
    return (int)result;
}

static inline int xct_pack4_nearest(int a, int b, int c, int d) {
    const auto nearest = [](int value) { return (uint32_t)(max(min(value, 127), -128) & 0xff); };
    return (int)(nearest(a) | nearest(b) << 8 | nearest(c) << 16 | nearest(d) << 24);
}

static inline int signed_byte(int word, int i) { return (int8_t)(word >> 8 * i); }

static inline int xct_dot4(int a, int b, int c) {
    for (int i = 0; i < 4; i++) c += signed_byte(a, i) * signed_byte(b, i);
    return c;
}

static inline int xct_perm_signs(int word, int selector) {
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        const int digit = selector >> 4 * i & 15, byte = digit % 8 < 4 ? signed_byte(word, digit % 4) : 0;
        result |= (uint32_t)((digit < 8 ? byte : byte >> 7) & 0xff) << 8 * i;
    }
    return (int)result;
}
static inline int xct_pair(int word, int half) { return xct_perm_signs(word, half ? 0xb3a2 : 0x9180); }
static inline int xct_mad_s16(int a, int b, int half, int c) {
    return c + (int16_t)(a >> 16 * half) * (int16_t)(b >> 16 * half);
}

static inline float xct_half_to_float(int half) { return _cvtsh_ss((unsigned short)half); }
static inline int xct_float_to_half(float value) { return _cvtss_sh(value, 0); }

static inline int xct_shuffle(int value, int mask) {
    int result = 0;
    struct Masked {
        static void execute(Collective& warp) {
            for (int lane = 0; lane < 32; lane++) {
                const int* mask = (const int*)warp.in[lane][0];
                *(int*)warp.out[lane] = warp.value[lane ^ *mask];
            }
        }
    };
    together(Masked::execute, &result, &mask, nullptr, value);
    return result;
}

static void check_shared(const void* p, size_t bytes, size_t alignment) {
    if ((const signed char*)p < _ptr || (const signed char*)p + bytes > _ptr + sizeof _ptr)
        fail("an address outside of the shared memory");
    if ((uintptr_t)p % alignment) fail("a shared address that is not aligned");
}

static inline int xct_shared_address(const void* p) { return (int)((const signed char*)p - _ptr); }

// cp.async: the copy may happen at any time from here to the wait for its group.
static void perform(const Copy& copy) {
    if (copy.valid) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
}

static inline void xct_copy16(int address, const void* global, int valid) {
    void* shared = _ptr + address;
    check_shared(shared, 16, 16);
    if ((uintptr_t)global % 16) fail("an asynchronous copy from an address that is not aligned");
    COUNT(shared, 16);
    COUNT(global, 16);
    const Copy copy = {shared, global, valid != 0};
    if (copies_are_early) perform(copy);
    else fibres[current].copies.push_back(copy);
}

static inline void xct_commit() {
    Fibre& fibre = fibres[current];
    fibre.groups.push_back(fibre.copies);
    fibre.copies.clear();
}

static void wait_for_all_but(size_t youngest) {
    Fibre& fibre = fibres[current];
    while (fibre.groups.size() > youngest) {
        for (const Copy& copy : fibre.groups.front()) perform(copy);
        fibre.groups.erase(fibre.groups.begin());
    }
}

static inline void xct_wait_0() { wait_for_all_but(0); }
static inline void xct_wait_1() { wait_for_all_but(1); }
static inline void xct_wait_2() { wait_for_all_but(2); }

// ldmatrix .x4: lane l points at row l % 8 of matrix l / 8, and receives bytes 4 (l % 4) on of row l / 4 of each.
static inline void xct_ldmatrix(int* d, int address) {
    const void* shared = _ptr + address;
    struct Load {
        static void execute(Collective& warp) {
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < 4; i++) {
                    const char* row = (const char*)warp.in[i * 8 + lane / 4][0];
                    std::memcpy((int*)warp.out[lane] + i, row + lane % 4 * 4, 4);
                }
        }
    };
    check_shared(shared, 16, 16);
    COUNT(shared, 16);
    together(Load::execute, d, shared, nullptr, 0);
}

// The layouts of fragments are those of the PTX ISA, "Matrix Fragments for mma.m16n8k32" and "mma.m16n8k16".
static inline void xct_mma_s8(int* c, const int* a, const int* b) {
    struct Mma {
        static void execute(Collective& warp) {
            int8_t left[16][32], right[8][32];
            for (int lane = 0; lane < 32; lane++) {
                const int group = lane / 4, thread = lane % 4;
                const int *a = (const int*)warp.in[lane][0], *b = (const int*)warp.in[lane][1];
                for (int r = 0; r < 4; r++) std::memcpy(&left[group + r % 2 * 8][thread * 4 + r / 2 * 16], a + r, 4);
                for (int r = 0; r < 2; r++) std::memcpy(&right[group][thread * 4 + r * 16], b + r, 4);
            }
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < 4; i++) {
                    int sum = 0;
                    const int8_t *x = left[lane / 4 + i / 2 * 8], *y = right[lane % 4 * 2 + i % 2];
                    for (int k = 0; k < 32; k++) sum += x[k] * y[k];
                    ((int*)warp.out[lane])[i] += sum;
                }
        }
    };
    together(Mma::execute, c, a, b, 0);
}

static inline void xct_mma_f16(float* c, const int* a, const int* b) {
    struct Mma {
        static void execute(Collective& warp) {
            float left[16][16], right[8][16];
            for (int lane = 0; lane < 32; lane++) {
                const int group = lane / 4, thread = lane % 4;
                const unsigned *a = (const unsigned*)warp.in[lane][0], *b = (const unsigned*)warp.in[lane][1];
                for (int r = 0; r < 4; r++)
                    for (int i = 0; i < 2; i++)
                        left[group + r % 2 * 8][thread * 2 + r / 2 * 8 + i] = xct_half_to_float(a[r] >> 16 * i);
                for (int r = 0; r < 2; r++)
                    for (int i = 0; i < 2; i++) right[group][thread * 2 + r * 8 + i] = xct_half_to_float(b[r] >> 16 * i);
            }
            for (int lane = 0; lane < 32; lane++)
                for (int i = 0; i < 4; i++) {
                    float sum = 0;
                    const float *x = left[lane / 4 + i / 2 * 8], *y = right[lane % 4 * 2 + i % 2];
                    for (int k = 0; k < 16; k++) sum += x[k] * y[k];
                    ((float*)warp.out[lane])[i] += sum;
                }
        }
    };
    together(Mma::execute, c, a, b, 0);
}

// wmma fragments: a layout of our own, as the hardware's is its own. Lane l holds the l-th part of the matrix, rows of
// a, columns of b, rows of the sums. Every row must begin at a multiple of the size of a lane's fragment (PTX ISA,
// "Matrix storage for WMMA"): 8 bytes of int8; of float16 32 bytes, for it is held twice; 32 bytes of sums.
static void check_rows(const void* shared, int stride_bytes, int row_bytes, int fragment_bytes) {
    check_shared(shared, 15 * stride_bytes + row_bytes, fragment_bytes);
    if (stride_bytes % fragment_bytes) fail("rows of a fragment that are not aligned");
}

template <typename Item>
UNSEEN static void load_fragment(Collective& warp) {
    for (int lane = 0; lane < 32; lane++) {
        if (warp.in[lane][0] != warp.in[0][0]) fail("lanes load a fragment from different addresses");
        for (int i = 0; i < 8; i++) {
            const int n = lane * 8 + i;
            ((Item*)warp.out[lane])[i] = ((const Item*)warp.in[0][0])[n / 16 * warp.value[0] + n % 16];
        }
    }
}

template <typename Item, typename Sum>
static void multiply_fragments(Collective& warp) {
    const auto item = [&](int operand, int row, int k) -> Sum {
        const int n = row * 16 + k;
        const Item value = ((const Item*)warp.in[n / 8][operand])[n % 8];
        if constexpr (sizeof(Item) == 2) return xct_half_to_float(value);
        else return value;
    };
    for (int n = 0; n < 256; n++) {
        Sum sum = 0;
        for (int k = 0; k < 16; k++) sum += item(0, n / 16, k) * item(1, n % 16, k);
        ((Sum*)warp.out[n / 8])[n % 8] += sum;
    }
}

template <typename Sum>
UNSEEN static void store_fragment(Collective& warp) {
    for (int n = 0; n < 256; n++)
        ((Sum*)warp.out[0])[n / 16 * warp.value[0] + n % 16] = ((const Sum*)warp.in[n / 8][0])[n % 8];
}

static inline void xct_wmma_load_a_s8(int* d, const void* shared, int stride) {
    check_rows(shared, stride, 16, 8);
    together(load_fragment<int8_t>, d, shared, nullptr, stride);
}
static inline void xct_wmma_load_b_s8(int* d, const void* shared, int stride) { xct_wmma_load_a_s8(d, shared, stride); }
static inline void xct_wmma_s8(int* c, const int* a, const int* b) {
    together(multiply_fragments<int8_t, int>, c, a, b, 0);
}
static inline void xct_wmma_store_s32(void* shared, const int* c, int stride) {
    check_rows(shared, stride * 4, 64, 32);
    together(store_fragment<int>, shared, c, nullptr, stride);
}
static inline void xct_wmma_load_a_f16(int* d, const void* shared, int stride) {
    check_rows(shared, stride * 2, 32, 32);
    together(load_fragment<uint16_t>, d, shared, nullptr, stride);
}
static inline void xct_wmma_load_b_f16(int* d, const void* shared, int stride) {
    xct_wmma_load_a_f16(d, shared, stride);
}
static inline void xct_wmma_f16(float* c, const int* a, const int* b) {
    together(multiply_fragments<uint16_t, float>, c, a, b, 0);
}
static inline void xct_wmma_store_f32(void* shared, const float* c, int stride) {
    check_rows(shared, stride * 4, 64, 32);
    together(store_fragment<float>, shared, c, nullptr, stride);
}
