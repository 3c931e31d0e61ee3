//! From the first Rust function to the workload: the order in which the machine is brought up.

use spin::Once;
use x86_64::PhysAddr;
use x86_64::instructions::interrupts;

use crate::arch::exit::{self, Verdict};
use crate::arch::phys_map::phys_to_ptr;
use crate::arch::pvh::BootInfo;
use crate::arch::{acpi, apic, asm, clock, descriptors, frames, heap, mmu, paging, serial};
use crate::cpu::index::{CpuIndex, MAX_CPUS};
use crate::cpu::smp::{self, KERNEL_STACK_PAGES};
use crate::cpu::{percpu, watchdog};
use crate::options::Options;
use crate::println;
use crate::workloads::select;

/// What the loader passed; read once, kept for the whole run.
static BOOT_INFO: Once<BootInfo> = Once::new();
/// The CPUs that the firmware lists.
static APIC_IDS: Once<arrayvec::ArrayVec<u32, MAX_CPUS>> = Once::new();

/// Seconds without progress after which the run is given up, unless the command line says
/// otherwise.
const DEFAULT_WATCHDOG_S: u64 = 30;

/// Called by `start.s` on the first CPU: on the boot stack and the boot tables, interrupts off.
#[cfg_attr(not(bare), expect(dead_code, reason = "called from assembly, which only the image has"))]
pub(crate) extern "C" fn boot_main(start_info: u32) -> ! {
    let me = percpu::prepare(CpuIndex::FIRST, mmu::initial_apic_id());
    // SAFETY: just prepared, for the only CPU that runs; `start.s` has loaded GS already.
    unsafe { percpu::install(me) };
    serial::init();
    // SAFETY: EBX at the PVH entry, kept by `start.s`; the boot tables map the first 4 GiB; nothing
    // was allocated yet.
    let info = BOOT_INFO.call_once(|| unsafe { BootInfo::read(PhysAddr::new(u64::from(start_info))) });
    APIC_IDS.call_once(|| {
        // SAFETY: the loader found the root pointer; the boot tables map the first 4 GiB.
        info.rsdp.map_or_else(Default::default, |rsdp| unsafe { acpi::apic_ids(rsdp) })
    });
    frames::init(&info.ram, &[paging::image_frames(), info.module.clone().unwrap_or(0..0)]);
    mmu::enable_features();
    paging::init(&info.ram, apic::registers());
    let stack = paging::new_stack(KERNEL_STACK_PAGES);
    // SAFETY: the stack is new; nothing of the boot stack is needed any more.
    unsafe { asm::call_on_stack(stack.as_u64(), main_on_own_stack) }
}

/// The rest of the way up, on a stack with a guard page.
extern "C" fn main_on_own_stack() -> ! {
    let heap_bytes = heap::init();
    descriptors::load();
    apic::mask_legacy_controllers(0);
    apic::init();
    clock::init();
    percpu::set_online(CpuIndex::FIRST);
    interrupts::enable();
    let info = BOOT_INFO.get().expect("read by `boot_main`");
    let options = Options::new(info.command_line());
    let nr_cpus = smp::start_others(APIC_IDS.get().expect("read by `boot_main`"));
    let (nr_frames, _) = frames::available();
    let features = mmu::features();
    println!(
        "boot: cpus={nr_cpus} free_mib={} heap_mib={} tsc_hz={} x2apic={} pcid={} invpcid={}",
        nr_frames >> 8,
        heap_bytes >> 20,
        clock::cycles_per_second(),
        features.x2apic,
        features.pcid,
        features.invpcid,
    );
    println!("boot: options \"{}\"", options.line());
    match options.number("watchdog") {
        Ok(Some(0)) => {}
        Ok(limit_s) => watchdog::start(limit_s.unwrap_or(DEFAULT_WATCHDOG_S)),
        Err(text) => {
            println!("boot: watchdog={text}: expected a number of seconds, 0 for none");
            exit::exit(Verdict::Usage);
        }
    }
    let verdict = select::run_workload(&options, module(info));
    println!("boot: verdict {verdict:?}");
    exit::exit(verdict)
}

/// Returns the file that was loaded beside the image.
fn module(info: &BootInfo) -> Option<&'static [u8]> {
    let range = info.module.as_ref()?;
    let length = usize::try_from(range.end - range.start).ok()?;
    // SAFETY: the loader put the file into RAM, all of which is mapped (B3), and its frames were
    // kept from the allocator, so nobody ever writes there.
    Some(unsafe { core::slice::from_raw_parts(phys_to_ptr(PhysAddr::new(range.start)), length) })
}
