// The PTX of wgmma for each number of columns, for nvcc: part of wgmma.h. An instruction names every register of its
// accumulator, and operands are numbered behind these: R<n> lists n registers, D<n> binds them, and a shape gives the
// numbers of the seven operands that follow.
#pragma once

#define MMK_R4 "%0, %1, %2, %3"
#define MMK_R8 MMK_R4 ", %4, %5, %6, %7"
#define MMK_R12 MMK_R8 ", %8, %9, %10, %11"
#define MMK_R16 MMK_R12 ", %12, %13, %14, %15"
#define MMK_R20 MMK_R16 ", %16, %17, %18, %19"
#define MMK_R24 MMK_R20 ", %20, %21, %22, %23"
#define MMK_R28 MMK_R24 ", %24, %25, %26, %27"
#define MMK_R32 MMK_R28 ", %28, %29, %30, %31"
#define MMK_R36 MMK_R32 ", %32, %33, %34, %35"
#define MMK_R40 MMK_R36 ", %36, %37, %38, %39"
#define MMK_R44 MMK_R40 ", %40, %41, %42, %43"
#define MMK_R48 MMK_R44 ", %44, %45, %46, %47"
#define MMK_R52 MMK_R48 ", %48, %49, %50, %51"
#define MMK_R56 MMK_R52 ", %52, %53, %54, %55"
#define MMK_R60 MMK_R56 ", %56, %57, %58, %59"
#define MMK_R64 MMK_R60 ", %60, %61, %62, %63"
#define MMK_R80 MMK_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MMK_R96 MMK_R80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MMK_R112 MMK_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define MMK_R128 \
    MMK_R112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define MMK_D(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MMK_D4 MMK_D(0)
#define MMK_D8 MMK_D4, MMK_D(4)
#define MMK_D12 MMK_D8, MMK_D(8)
#define MMK_D16 MMK_D12, MMK_D(12)
#define MMK_D20 MMK_D16, MMK_D(16)
#define MMK_D24 MMK_D20, MMK_D(20)
#define MMK_D28 MMK_D24, MMK_D(24)
#define MMK_D32 MMK_D28, MMK_D(28)
#define MMK_D36 MMK_D32, MMK_D(32)
#define MMK_D40 MMK_D36, MMK_D(36)
#define MMK_D44 MMK_D40, MMK_D(40)
#define MMK_D48 MMK_D44, MMK_D(44)
#define MMK_D52 MMK_D48, MMK_D(48)
#define MMK_D56 MMK_D52, MMK_D(52)
#define MMK_D60 MMK_D56, MMK_D(56)
#define MMK_D64 MMK_D60, MMK_D(60)
#define MMK_D80 MMK_D64, MMK_D(64), MMK_D(68), MMK_D(72), MMK_D(76)
#define MMK_D96 MMK_D80, MMK_D(80), MMK_D(84), MMK_D(88), MMK_D(92)
#define MMK_D112 MMK_D96, MMK_D(96), MMK_D(100), MMK_D(104), MMK_D(108)
#define MMK_D128 MMK_D112, MMK_D(112), MMK_D(116), MMK_D(120), MMK_D(124)

// a by descriptor: operands a, b, accumulate, and whether a and b are transposed, as the dense dimension not being k is
// called.
#define MMK_WGMMA_DESCRIPTORS(N, R, type, o0, o1, o2, o3, o4)                                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
                 " {" MMK_R##R "}, %" #o0 ", %" #o1 ", p, 1, 1, %" #o3 ", %" #o4 ";\n}"                                \
                 : MMK_D##R                                                                                            \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA), "n"(kTransposeB))

// a in registers: operands a[0] to a[3], b, accumulate, whether b is transposed.
#define MMK_WGMMA_REGISTERS(N, R, type, o0, o1, o2, o3, o4, o5, o6)                                                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type \
                 " {" MMK_R##R "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n}"          \
                 : MMK_D##R                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),              \
                   "n"(kTransposeB))

#define MMK_WGMMA_SHAPE(N, R, o0, o1, o2, o3, o4, o5, o6)                                             \
    template <bool kBFloat16, int kTransposeA, int kTransposeB>                                       \
    MMK_DEVICE void wgmma_issue(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {             \
        if constexpr (kBFloat16) {                                                                    \
            MMK_WGMMA_DESCRIPTORS(N, R, "bf16.bf16", o0, o1, o2, o3, o4);                             \
        } else {                                                                                      \
            MMK_WGMMA_DESCRIPTORS(N, R, "f16.f16", o0, o1, o2, o3, o4);                               \
        }                                                                                             \
    }                                                                                                 \
    template <bool kBFloat16, int kTransposeB>                                                        \
    MMK_DEVICE void wgmma_issue(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
        if constexpr (kBFloat16) {                                                                    \
            MMK_WGMMA_REGISTERS(N, R, "bf16.bf16", o0, o1, o2, o3, o4, o5, o6);                       \
        } else {                                                                                      \
            MMK_WGMMA_REGISTERS(N, R, "f16.f16", o0, o1, o2, o3, o4, o5, o6);                         \
        }                                                                                             \
    }

MMK_WGMMA_SHAPE(8, 4, 4, 5, 6, 7, 8, 9, 10)
MMK_WGMMA_SHAPE(16, 8, 8, 9, 10, 11, 12, 13, 14)
MMK_WGMMA_SHAPE(24, 12, 12, 13, 14, 15, 16, 17, 18)
MMK_WGMMA_SHAPE(32, 16, 16, 17, 18, 19, 20, 21, 22)
MMK_WGMMA_SHAPE(40, 20, 20, 21, 22, 23, 24, 25, 26)
MMK_WGMMA_SHAPE(48, 24, 24, 25, 26, 27, 28, 29, 30)
MMK_WGMMA_SHAPE(56, 28, 28, 29, 30, 31, 32, 33, 34)
MMK_WGMMA_SHAPE(64, 32, 32, 33, 34, 35, 36, 37, 38)
MMK_WGMMA_SHAPE(72, 36, 36, 37, 38, 39, 40, 41, 42)
MMK_WGMMA_SHAPE(80, 40, 40, 41, 42, 43, 44, 45, 46)
MMK_WGMMA_SHAPE(88, 44, 44, 45, 46, 47, 48, 49, 50)
MMK_WGMMA_SHAPE(96, 48, 48, 49, 50, 51, 52, 53, 54)
MMK_WGMMA_SHAPE(104, 52, 52, 53, 54, 55, 56, 57, 58)
MMK_WGMMA_SHAPE(112, 56, 56, 57, 58, 59, 60, 61, 62)
MMK_WGMMA_SHAPE(120, 60, 60, 61, 62, 63, 64, 65, 66)
MMK_WGMMA_SHAPE(128, 64, 64, 65, 66, 67, 68, 69, 70)
MMK_WGMMA_SHAPE(160, 80, 80, 81, 82, 83, 84, 85, 86)
MMK_WGMMA_SHAPE(192, 96, 96, 97, 98, 99, 100, 101, 102)
MMK_WGMMA_SHAPE(224, 112, 112, 113, 114, 115, 116, 117, 118)
MMK_WGMMA_SHAPE(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef MMK_WGMMA_SHAPE
#undef MMK_WGMMA_REGISTERS
#undef MMK_WGMMA_DESCRIPTORS
