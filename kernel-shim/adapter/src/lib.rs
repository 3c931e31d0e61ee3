//! The small kernel of this project as one client of the hosted machine.
//!
//! ```text
//!  allocation   each request for memory refused in turn
//!  judge        sequences on the small kernel; what is wrong with it on purpose
//!      │
//!      v
//!  kernel       the kernel as the kit wants it: `mmu_hosted::Kernel`
//!      │        tables_against_frames, leaves_against_areas, boundaries, views: what only this
//!      │        kernel can be asked
//!      v
//!  stage        fixed work, done here
//!  program      boot; programs touch memory
//!      │
//!      v
//!  machine      the hosted machine as this kernel wants it: `mmu_kernel_shim::Machine`
//!               words: the words of the one, in those of the other
//! ```
//!
//! A file uses what is below it. A stranger's kernel that calls the machine directly needs `kernel`
//! alone: `kernel-shim/hosted/examples/stranger`.
#![deny(unsafe_code)]

mod allocation;
mod boundaries;
mod judge;
mod kernel;
mod leaves_against_areas;
mod machine;
mod program;
mod stage;
mod tables_against_frames;
mod views;
mod words;

pub use allocation::{Case, Refusal, Refused, Wrong, refuse_each};
pub use judge::{Trial, execute, execute_with, judge, judge_in, shrink, views};
pub use kernel::ShimKernel;
pub use machine::Hosted;
pub use program::{HostedKernel, HostedMm, Touched, boot, touch};
pub use stage::HostedStage;
pub use views::View;
