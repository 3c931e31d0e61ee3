//! The rules of x86 translation caching, one test a sentence. Sections are those of the Intel SDM
//! vol. 3A unless said otherwise.
//!
//! Each test ends by comparing what the watcher was told with what the caches hold.

mod access;
mod broadcast;
mod caching;
mod invalidation;
mod reach;
mod rig;
mod walking;
