//! The command as a person meets it: started, and what it said.
#![allow(dead_code, reason = "each test file is a crate of its own, and uses a part of this")]

use std::process::{Command, Output};

use serde_json::Value;

pub(crate) fn teardown(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_teardown")).args(args).output().expect("the command starts")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The report, which is JSON.
pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("the report is JSON")
}

/// The report of `run` or `trace` says that nothing was wrong.
pub(crate) fn assert_clean(report: &Value) {
    for count in ["violations", "leaked_frames", "leaked_tables", "double_frees"] {
        assert_eq!(report[count], 0, "{count} in {report}");
    }
}
