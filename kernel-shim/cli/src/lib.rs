//! The parts of the command `teardown`: snapshots of real address spaces, recorded system calls, and what is done with them.

#![deny(unsafe_code)]

pub mod boot;
mod boot_image;
pub mod boot_plan;
mod boot_qemu;
pub mod boot_report;
pub mod bundled;
pub mod capture;
pub mod explain;
pub mod fuzz;
pub mod fuzz_report;
mod fuzz_watch;
mod host;
pub mod html;
pub mod layout;
#[cfg(test)]
mod layout_tests;
mod layout_text;
pub mod output;
mod pagemap;
pub mod process;
mod replay;
pub mod report;
pub mod run;
pub mod shown;
mod space;
pub mod strace;
mod strace_lex;
mod strace_names;
#[cfg(test)]
mod strace_tests;
pub mod sweep;
mod sweep_answer;
pub mod sweep_axes;
mod sweep_chart;
mod sweep_html;
mod sweep_machine;
pub mod sweep_measure;
pub mod sweep_process;
mod sweep_report;
#[cfg(test)]
mod sweep_tests;
mod tidy;
pub mod timeline;
mod timeline_focus;
mod timeline_story;
mod timeline_words;
pub mod trace;
