//! What safe code cannot do, because it does not compile: each case is a small embedder with one
//! such line.
//!
//! `TRYBUILD=overwrite cargo test -p mmu-tests --test compile_fail` writes the messages of the
//! compiler anew; `refused` marks the line. With another compiler than the one that the workspace
//! names the messages may differ, but not the errors.

#[test]
fn what_would_break_the_promise_does_not_compile() {
    // `kernel.rs` is a module of the cases, not a case.
    let cases = trybuild::TestCases::new();
    for case in std::fs::read_dir("compile_fail").expect("cases") {
        let case = case.expect("a case").path();
        if case.extension().is_some_and(|extension| extension == "rs") && !case.ends_with("kernel.rs") {
            cases.compile_fail(case);
        }
    }
}
