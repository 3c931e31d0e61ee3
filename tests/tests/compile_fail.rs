//! What safe code cannot even write: each case is a small embedder with one line that must not compile.
//!
//! `TRYBUILD=overwrite cargo test -p mmu-tests --test compile_fail` writes down anew what the compiler says; `refused` marks the
//! line. With another compiler than the one named in the workspace the words may differ, the errors may not.

#[test]
fn what_would_break_the_promise_does_not_compile() {
    // `kernel.rs` is a module of the cases, and no case itself.
    let cases = trybuild::TestCases::new();
    for case in std::fs::read_dir("compile_fail").expect("cases") {
        let case = case.expect("a case").path();
        if case.extension().is_some_and(|extension| extension == "rs") && !case.ends_with("kernel.rs") {
            cases.compile_fail(case);
        }
    }
}
