// What each primitive moves where, against tables written from the PTX ISA's sections on matrix fragments, ldmatrix,
// tensor swizzles and shuffles, and from CuTe's canonical layouts of the wgmma descriptor; none of them shares a line
// with the emulator. Small integers: every sum is exact.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/isa/launch.h"
#include "cuda/isa/tensor_map.h"
#include "cuda/isa/wgmma.h"

using namespace mmk;
using namespace mmk::cuda;

static int failures = 0;
#define CHECK(condition, ...)                      \
    do {                                           \
        if (!(condition)) {                        \
            if (failures++ < 10) {                 \
                printf("FAILED %s: ", #condition); \
                printf(__VA_ARGS__);               \
                printf("\n");                      \
            }                                      \
        }                                          \
    } while (0)

static float digit() { return static_cast<float>(rand() % 9 - 4); }

template <class T>
static uint32_t bits(float x) {
    const T value(x);
    if constexpr (sizeof(T) == 4) return emulator::bits_of(value);
    if constexpr (sizeof(T) == 2) return value.bits;
}

// ---- fragments of mma: "groupID" and "threadID_in_group" as the PTX ISA calls them

struct Place {
    int row, column;
};
struct HalfFragments {  // m16n8k16
    static constexpr int kDepth = 16, kPerRegister = 2;
    static Place a(int group, int thread, int i) {
        const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
        return {upper ? group : group + 8, i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8};
    }
    static Place b(int group, int thread, int i) {
        return {i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8, group};
    }
};
struct Tf32Fragments {  // m16n8k8
    static constexpr int kDepth = 8, kPerRegister = 1;
    static Place a(int group, int thread, int i) {
        return {i == 0 || i == 2 ? group : group + 8, i == 0 || i == 1 ? thread : thread + 4};
    }
    static Place b(int group, int thread, int i) { return {i == 0 ? thread : thread + 4, group}; }
};
static Place fragment_c(int group, int thread, int i) { return {i < 2 ? group : group + 8, thread * 2 + (i & 1)}; }

template <class Fragments>
struct Matrices {
    float a[16][Fragments::kDepth], b[Fragments::kDepth][8], c[16][8], d[16][8];
};

template <class T, class Fragments>
__global__ void mma_kernel(Matrices<Fragments>* m) {
    const int lane = static_cast<int>(threadIdx.x), group = lane >> 2, thread = lane % 4;
    constexpr int kPer = Fragments::kPerRegister;
    uint32_t a[4] = {}, b[2] = {};
    float d[4];
    for (int i = 0; i < 4 * kPer; i++) {
        const Place place = Fragments::a(group, thread, i);
        a[i / kPer] |= bits<T>(m->a[place.row][place.column]) << i % kPer * 16;
    }
    for (int i = 0; i < 2 * kPer; i++) {
        const Place place = Fragments::b(group, thread, i);
        b[i / kPer] |= bits<T>(m->b[place.row][place.column]) << i % kPer * 16;
    }
    for (int i = 0; i < 4; i++) {
        const Place place = fragment_c(group, thread, i);
        d[i] = m->c[place.row][place.column];
    }
    if constexpr (kPer == 2) mma<T>(d, a, b);
    if constexpr (kPer == 1) mma_tf32(d, a, b);
    for (int i = 0; i < 4; i++) {
        const Place place = fragment_c(group, thread, i);
        m->d[place.row][place.column] = d[i];
    }
}

template <class T, class Fragments>
static void check_mma(const char* what) {
    Matrices<Fragments> m;
    for (auto& row : m.a)
        for (float& x : row) x = digit();
    for (auto& row : m.b)
        for (float& x : row) x = digit();
    for (auto& row : m.c)
        for (float& x : row) x = digit();
    emulator::launch(mma_kernel<T, Fragments>, {1, kWarp, 0}, &m);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            float sum = m.c[i][j];
            for (int k = 0; k < Fragments::kDepth; k++) sum += m.a[i][k] * m.b[k][j];
            CHECK(m.d[i][j] == sum, "mma %s at (%d, %d)", what, i, j);
        }
    }
}

// ---- ldmatrix: row 8 i + r of the source is row r of matrix i, and holds 8 times its number and up

__global__ void ldmatrix_kernel(uint32_t* out, bool transpose) {
    MMK_SHARED(uint4, rows, 32);
    const int lane = static_cast<int>(threadIdx.x);
    uint16_t row[8];
    for (int i = 0; i < 8; i++) row[i] = static_cast<uint16_t>(lane * 8 + i);
    memcpy(&rows[lane], row, sizeof row);
    __syncwarp();
    uint32_t r[4];
    if (transpose)
        ldmatrix_x4_trans(r, &rows[lane]);
    else
        ldmatrix_x4(r, &rows[lane]);
    for (int i = 0; i < 4; i++) out[lane * 4 + i] = r[i];
}

static void check_ldmatrix() {
    for (const bool transpose : {false, true}) {
        uint32_t out[32][4];
        emulator::launch(ldmatrix_kernel, {1, kWarp, 0}, &out[0][0], transpose);
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                for (int half = 0; half < 2; half++) {  // thread 4 r + c / 2 holds elements c and c + 1 of row r
                    const int along = lane % 4 * 2 + half, across = lane / 4;
                    const int expected = transpose ? i * 64 + along * 8 + across : i * 64 + across * 8 + along;
                    const int found = static_cast<int>(out[lane][i] >> half * 16 & 0xFFFF);
                    CHECK(found == expected, "ldmatrix trans %d: lane %d register %d", transpose, lane, i);
                }
            }
        }
    }
}

// ---- shuffles and votes

__global__ void shuffle_kernel(int* out) {
    const int t = static_cast<int>(threadIdx.x);
    int* const of_thread = out + t * 8;
    of_thread[0] = __shfl_sync(kAllLanes, t, 5, 8);
    of_thread[1] = __shfl_up_sync(kAllLanes, t, 3, 8);
    of_thread[2] = __shfl_down_sync(kAllLanes, t, 3, 8);
    of_thread[3] = __shfl_xor_sync(kAllLanes, t, 5);
    of_thread[4] = static_cast<int>(__ballot_sync(kAllLanes, t % 3 == 0));
    of_thread[5] = __any_sync(kAllLanes, t % 32 == 31) + 2 * __all_sync(kAllLanes, t % 32 < 31);
    of_thread[6] = t % 32 < 16 ? static_cast<int>(__ballot_sync(0x0000FFFF, true)) : __shfl_sync(0xFFFF0000, t, 20);
    of_thread[7] = static_cast<int>(__shfl_sync(kAllLanes, int64_t{t} << 32, 7) >> 32);
}

static void check_shuffles() {
    int out[64][8];
    emulator::launch(shuffle_kernel, {1, 64, 0}, &out[0][0]);
    for (int t = 0; t < 64; t++) {
        const int warp = t / 32 * 32, part = t / 8 * 8, lane = t % 32;
        int votes = 0;
        for (int i = 0; i < 32; i++) votes |= static_cast<int>(static_cast<unsigned>((warp + i) % 3 == 0) << i);
        const int expected[8] = {part + 5,
                                 t - part < 3 ? t : t - 3,
                                 t - part > 4 ? t : t + 3,
                                 warp + (lane ^ 5),
                                 votes,
                                 1,
                                 lane < 16 ? 0xFFFF : warp + 20,
                                 warp + 7};
        for (int i = 0; i < 8; i++) CHECK(out[t][i] == expected[i], "shuffle or vote %d of thread %d", i, t);
    }
}

// ---- swizzles: in which 16-byte chunk of its row chunk c of row r lies, as the figures of the PTX ISA draw it

constexpr int kSwizzle128[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
                                   {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                                   {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};
constexpr int kSwizzle64[8][4] = {{0, 1, 2, 3}, {0, 1, 2, 3}, {1, 0, 3, 2}, {1, 0, 3, 2},
                                  {2, 3, 0, 1}, {2, 3, 0, 1}, {3, 2, 1, 0}, {3, 2, 1, 0}};
constexpr int kSwizzle32[8][2] = {{0, 1}, {0, 1}, {0, 1}, {0, 1}, {1, 0}, {1, 0}, {1, 0}, {1, 0}};

// Where byte `offset` of a tile without a swizzle lies with one whose rows are `width` bytes.
static int swizzle(int offset, int width) {
    if (width == 0) return offset;
    const int row = offset / width % 8, chunk = offset % width / 16;
    const int moved = width == 128  ? kSwizzle128[row][chunk]
                      : width == 64 ? kSwizzle64[row][chunk]
                                    : kSwizzle32[row][chunk];
    return offset + (moved - chunk) * 16;
}

// ---- tiles of tensors: a (5, 7, 40) tensor with padding, boxes of (2, 8, width), from inside and over every edge

constexpr int kPlanes = 5, kRows = 7, kColumns = 40, kPitch = 48, kPlanePitch = kPitch * 8;
constexpr int kBoxPlanes = 2, kBoxRows = 8, kBoxBytes = 2048;  // a whole number of patterns

__global__ void tensor_copy_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                                   uint16_t* seen, int x, int y, int z, int bytes) {
    MMK_DYNAMIC_SHARED(tile);
    MMK_SHARED(uint64_t, barrier, 1);
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(barrier, bytes);
        tensor_load(tile, &from, {x, y, z}, barrier);
    }
    __syncthreads();
    mbarrier_wait(barrier, 0);
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 2; i += kWarp)
        seen[i] = reinterpret_cast<uint16_t*>(tile)[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        tensor_store(&to, {x, y, z}, tile);
        bulk_store_commit();
        bulk_store_wait_read<0>();
    }
}

static void check_tiles(RowSwizzle mode) {
    const int width = static_cast<int>(mode), columns = width == 0 ? 24 : width / 2;
    const int bytes = kBoxPlanes * kBoxRows * columns * 2;
    const int corners[][3] = {{0, 0, 0}, {8, 1, 2}, {-3, -2, -1}, {33, 5, 4}, {100, 0, 0}};
    for (const auto& [x, y, z] : corners) {
        alignas(16) uint16_t from[kPlanes * kPlanePitch], to[kPlanes * kPlanePitch], seen[kBoxBytes / 2];
        for (uint16_t& number : from) number = static_cast<uint16_t>(rand());
        for (uint16_t& number : to) number = 0xABCD;
        TensorLayout<3> layout{from,
                               {kColumns, kRows, kPlanes},
                               {kPitch * 2, kPlanePitch * 2},
                               {static_cast<uint32_t>(columns), kBoxRows, kBoxPlanes},
                               mode};
        CUtensorMap from_map, to_map;
        CHECK(!encode<BFloat16>(from_map, "test", layout), "encode, width %d", width);
        layout.base = to;
        CHECK(!encode<BFloat16>(to_map, "test", layout), "encode, width %d", width);
        emulator::launch(tensor_copy_kernel, {1, kWarp, kBoxBytes}, from_map, to_map, seen, x, y, z, bytes);
        std::vector<uint16_t> expected_to(std::begin(to) - 0, std::end(to));
        for (uint16_t& number : expected_to) number = 0xABCD;
        for (int i = 0; i < bytes / 2; i++) {
            const int column = x + i % columns, row = y + i / columns % kBoxRows, plane = z + i / columns / kBoxRows;
            const bool inside =
                column >= 0 && column < kColumns && row >= 0 && row < kRows && plane >= 0 && plane < kPlanes;
            const int at = plane * kPlanePitch + row * kPitch + column;
            const uint16_t expected = inside ? from[at] : uint16_t{0};
            CHECK(seen[swizzle(i * 2, width) / 2] == expected, "tile of width %d at (%d, %d, %d)", width, x, y, z);
            if (inside) expected_to[static_cast<size_t>(at)] = expected;
        }
        for (size_t i = 0; i < expected_to.size(); i++) {
            CHECK(to[i] == expected_to[i], "store of width %d at (%d, %d, %d)", width, x, y, z);
        }
    }
}

// ---- wgmma: operands placed by CuTe's canonical layouts, ((8, m), (T, 2)) and ((T, W, m), (8, k)), T = 8 numbers

struct Operand {
    Major major;
    Swizzle mode;
    int leading, stride, bytes;  // of the tile

    int width() const {
        return mode == Swizzle::k128 ? 128 : mode == Swizzle::k64 ? 64 : mode == Swizzle::k32 ? 32 : 0;
    }
    int offset(int i, int k) const {      // of element k of row or column i, in bytes
        const int chunks = width() / 16;  // W
        int plain;
        if (major == Major::kK) {
            if (chunks == 0)
                plain = i % 8 * 16 + i / 8 * stride + k % 8 * 2 + k / 8 * leading;
            else
                plain = i % 8 * chunks * 16 + i / 8 * stride + k % 8 * 2 + k / 8 * 16;
        } else {
            if (chunks == 0)
                plain = i % 8 * 2 + i / 8 * stride + k % 8 * 16 + k / 8 * leading;
            else
                plain =
                    i % 8 * 2 + i / 8 % chunks * 16 + i / 8 / chunks * leading + k % 8 * chunks * 16 + k / 8 * stride;
        }
        return swizzle(plain, width());
    }
};
// An operand of `count` rows or columns whose patterns lie one after another, with one pattern's gap between them.
static Operand place(Major major, Swizzle mode, int count) {
    Operand operand{major, mode, 0, 0, 0};
    const int width = operand.width(), pattern = width == 0 ? 128 : width * 8;
    const int wide = width == 0 ? 8 : width / 2;  // values of i in a row of a pattern whose dense dimension is i
    if (major == Major::kK) {
        operand.stride = 2 * pattern;
        operand.leading = width == 0 ? (count / 8) * 2 * pattern : 16;
    } else if (width == 0) {
        operand.stride = 2 * pattern;
        operand.leading = (count / 8) * 2 * pattern;
    } else {
        operand.stride = 2 * pattern;
        operand.leading = 4 * pattern;
    }
    operand.bytes = (count + wide - 1) / wide * 4 * pattern + 8 * pattern + 2 * count / 8 * 2 * pattern;
    operand.bytes = (operand.bytes + 1023) / 1024 * 1024;
    return operand;
}

struct WgmmaCall {
    Operand a, b;
    const uint16_t *bytes_a, *bytes_b;
    const uint32_t* registers;  // of a, [thread][4]
    const float* c;
    float* d;
};

template <class T, Major kA, Major kB, int kColumns, bool kFromRegisters>
__global__ void wgmma_kernel(const WgmmaCall call) {
    MMK_DYNAMIC_SHARED(shared);
    const int t = static_cast<int>(threadIdx.x);
    uint16_t *a = reinterpret_cast<uint16_t*>(shared), *b = a + call.a.bytes / 2;
    for (int i = t; i < call.a.bytes / 2; i += kWarpgroup) a[i] = call.bytes_a[i];
    for (int i = t; i < call.b.bytes / 2; i += kWarpgroup) b[i] = call.bytes_b[i];
    async_proxy_fence();
    __syncthreads();
    const auto descriptor = [](const void* tile, const Operand& operand) {
        return matrix_descriptor(shared_address(tile), static_cast<uint32_t>(operand.leading),
                                 static_cast<uint32_t>(operand.stride), operand.mode);
    };
    const uint64_t descriptor_b = descriptor(b, call.b);
    // Of warp w and lane 4 g + t, register i: row 16 w + g, or 8 more for i % 4 >= 2; columns 8 (i / 4) + 2 t + i % 2.
    const auto index = [&](int i) {
        const int row = t / 32 * 16 + t % 32 / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + t % 4 * 2 + i % 2;
        return row * kColumns + column;
    };
    float d[kColumns / 2];
    for (int i = 0; i < kColumns / 2; i++) d[i] = call.c[index(i)];
    wgmma_fence();
    if constexpr (kFromRegisters) {
        uint32_t registers[4];
        memcpy(registers, call.registers + t * 4, sizeof registers);
        wgmma<T, kB>(d, registers, descriptor_b, true);
    } else {
        wgmma<T, kA, kB>(d, descriptor(a, call.a), descriptor_b, true);
    }
    wgmma_commit();
    wgmma_wait<0>(d);
    for (int i = 0; i < kColumns / 2; i++) call.d[index(i)] = d[i];
}

template <class T, Major kA, Major kB, int kColumns, bool kFromRegisters>
static void check_wgmma(Swizzle mode_a, Swizzle mode_b) {
    WgmmaCall call{place(kA, mode_a, 64), place(kB, mode_b, kColumns), nullptr, nullptr, nullptr, nullptr, nullptr};
    std::vector<uint16_t> bytes_a(static_cast<size_t>(call.a.bytes) / 2, 0x7FC0);  // NaN where no element lies
    std::vector<uint16_t> bytes_b(static_cast<size_t>(call.b.bytes) / 2, 0x7FC0);
    std::vector<float> a(64 * 16), b(16 * kColumns), c(64 * kColumns), d(64 * kColumns);
    for (auto* matrix : {&a, &b, &c})
        for (float& x : *matrix) x = digit();
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 64; i++)
            bytes_a.at(call.a.offset(i, k) / 2) = static_cast<uint16_t>(bits<T>(a[i * 16 + k]));
        for (int j = 0; j < kColumns; j++) {
            bytes_b.at(call.b.offset(j, k) / 2) = static_cast<uint16_t>(bits<T>(b[k * kColumns + j]));
        }
    }
    std::vector<uint32_t> registers(128 * 4);
    for (int t = 0; t < 128; t++) {
        for (int i = 0; i < 8; i++) {
            const Place place = HalfFragments::a(t % 32 / 4, t % 4, i);
            registers[t * 4 + i / 2] |= bits<T>(a[(t / 32 * 16 + place.row) * 16 + place.column]) << i % 2 * 16;
        }
    }
    call.bytes_a = bytes_a.data();
    call.bytes_b = bytes_b.data();
    call.registers = registers.data();
    call.c = c.data();
    call.d = d.data();
    emulator::launch(wgmma_kernel<T, kA, kB, kColumns, kFromRegisters>,
                     {1, kWarpgroup, static_cast<size_t>(call.a.bytes + call.b.bytes)}, call);
    for (int i = 0; i < 64; i++) {
        for (int j = 0; j < kColumns; j++) {
            float sum = c[i * kColumns + j];
            for (int k = 0; k < 16; k++) sum += a[i * 16 + k] * b[k * kColumns + j];
            CHECK(d[i * kColumns + j] == sum,
                  "wgmma of %d columns, a %d from registers %d mode %d, b %d mode %d, at (%d, %d)", kColumns,
                  static_cast<int>(kA), kFromRegisters, static_cast<int>(mode_a), static_cast<int>(kB),
                  static_cast<int>(mode_b), i, j);
        }
    }
}

template <class T, int kColumns>
static void check_wgmma_layouts() {
    for (const Swizzle mode : {Swizzle::kNone, Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
        check_wgmma<T, Major::kK, Major::kK, kColumns, false>(mode, Swizzle::k128);
        check_wgmma<T, Major::kOther, Major::kK, kColumns, false>(mode, mode);
        check_wgmma<T, Major::kK, Major::kOther, kColumns, false>(Swizzle::kNone, mode);
        check_wgmma<T, Major::kK, Major::kK, kColumns, true>(Swizzle::kNone, mode);
        check_wgmma<T, Major::kK, Major::kOther, kColumns, true>(Swizzle::kNone, mode);
    }
}

// ---- numbers of 16 bits: the nearest one, and the even one of two as near

template <class T>
static void check_rounding(const char* what, float largest) {
    for (uint32_t i = 0; i < 0x10000; i++) {
        T value;
        value.bits = static_cast<uint16_t>(i);
        const float x = value;
        CHECK(x != x ? T(x) != T(x) : T(x).bits == value.bits, "%s %04x there and back", what, i);
        if (!(std::abs(x) < largest)) continue;
        T next;
        next.bits = static_cast<uint16_t>(i + 1);
        const double middle = (double{x} + double{next}) / 2;  // exact, and in the range of float
        const auto tie = static_cast<float>(middle);
        const T even = i % 2 == 0 ? value : next;
        if (double{tie} != middle) continue;  // between the smallest numbers of bfloat16
        CHECK(T(tie).bits == even.bits, "%s: tie after %04x", what, i);
        CHECK(T(std::nextafter(tie, x)).bits == value.bits, "%s: below the tie after %04x", what, i);
        CHECK(T(std::nextafter(tie, float{next})).bits == next.bits, "%s: above the tie after %04x", what, i);
    }
    CHECK(std::isinf(float{T(largest * 1.01f)}), "%s: overflow", what);
}

int main(int, char** arguments) {
    srand(static_cast<unsigned>(atoi(arguments[1])));
    check_rounding<Float16>("float16", 65504.0f);
    check_rounding<BFloat16>("bfloat16", 3.3895314e38f);
    check_mma<Float16, HalfFragments>("m16n8k16 f16");
    check_mma<BFloat16, HalfFragments>("m16n8k16 bf16");
    check_mma<float, Tf32Fragments>("m16n8k8 tf32");
    check_ldmatrix();
    check_shuffles();
    for (const auto mode : {RowSwizzle::kNone, RowSwizzle::k32, RowSwizzle::k64, RowSwizzle::k128}) check_tiles(mode);
    check_wgmma_layouts<BFloat16, 8>();
    check_wgmma_layouts<BFloat16, 72>();
    check_wgmma_layouts<Float16, 64>();
    check_wgmma_layouts<BFloat16, 256>();
    if (failures == 0) printf("right\n");
    return failures != 0;
}
