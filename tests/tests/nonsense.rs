//! Arguments that make no sense: no flush that is owed is lost, in debug and in release builds.

use mmu_gather::pagetable::{Level, MapError};
use mmu_gather::tlb::{FreedTables, PageSpan, flush_tlb_mm_range};
use mmu_tests::{Access, CPU, GIB, GatherOnPaper, Options, PaperKernel, range};

const PAGE: u64 = 4096;

#[test]
fn a_span_that_makes_no_sense_is_flushed_as_a_whole() {
    let spans = [
        (GIB + PAGE, GIB, 12),
        (u64::MAX, 0, 12),
        (GIB, GIB + PAGE, 64),
        (GIB, GIB + PAGE, u32::MAX),
        (0, u64::MAX, 0),
        (0, u64::MAX, 12),
    ];
    for flush_ceiling in [33, u64::MAX] {
        for (start, end, stride_shift) in spans {
            let kernel = PaperKernel::new(Options { flush_ceiling, ..Options::default() });
            let mm = kernel.new_mm();
            kernel.map(mm, GIB, Level::Pte);
            for cpu in [CPU[0], CPU[1]] {
                kernel.run(cpu, mm);
                kernel.touch(cpu, GIB, Access::Read).expect("mapped");
            }
            let span = PageSpan { start, end, stride_shift };
            if span.nr_pages() > 1 << 20 && span.nr_pages() != u64::MAX && flush_ceiling == u64::MAX {
                // Left out: this ceiling means never to flush all, so it would invalidate all these
                // pages one by one.
                continue;
            }
            assert!(!span.to_string().is_empty());
            let receipt = flush_tlb_mm_range(&kernel, mm.context(), span, FreedTables::No);
            assert!(receipt.is_of(mm.context()));
            for cpu in [CPU[0], CPU[1]] {
                assert_eq!(kernel.cached(cpu, GIB), None, "{span}");
            }
        }
    }
}

#[test]
fn the_kernels_half_is_not_moved() {
    let kernel = PaperKernel::new(Options::default());
    let mm = kernel.new_mm();
    let (user_end, above) = (1 << 47, (1 << 47) + PAGE);
    let moved = kernel.gather(mm).move_pages(range(user_end - PAGE, above), GIB);
    assert_eq!(moved, Err(MapError::NotUserSpace(above)));
}
