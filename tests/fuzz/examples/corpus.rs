//! Takes sequences from the folder of a campaign (`teardown fuzz --corpus DIR`) to the inputs of
//! the target `sequence`, and back.
//!
//! ```text
//! corpus to-bytes DIR INPUTS    writes an input for each of DIR/sequences/*.sequence
//! corpus to-text INPUTS DIR     writes DIR/sequences/*.sequence for each input
//! ```
//!
//! Files keep their names, but for the ending; those that are there already stay. What bytes cannot
//! say is cut (`Sequence::to_bytes`). What is not understood is passed over and counted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use mmu_hosted::Sequence;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let done = match &arguments[..] {
        [way, from, to] if way == "to-bytes" => to_bytes(Path::new(from), Path::new(to)),
        [way, from, to] if way == "to-text" => to_text(Path::new(from), Path::new(to)),
        _ => {
            eprintln!("usage: corpus to-bytes DIR INPUTS\n       corpus to-text INPUTS DIR");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(Converted { written, there, passed_over }) => {
            println!("{written} written, {there} there already, {passed_over} not understood");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// What became of the files.
#[derive(Debug, Default, PartialEq, Eq)]
struct Converted {
    written: usize,
    there: usize,
    passed_over: usize,
}

fn to_bytes(corpus: &Path, inputs: &Path) -> io::Result<Converted> {
    let sequences = corpus.join("sequences");
    convert(&sequences, inputs, "", |content| {
        let text = String::from_utf8(content).ok()?;
        Some(Sequence::parse(&text).ok()?.to_bytes())
    })
}

fn to_text(inputs: &Path, corpus: &Path) -> io::Result<Converted> {
    // Any bytes are a sequence.
    let text = |content: Vec<u8>| Some(Sequence::from_bytes(&content).to_string().into_bytes());
    convert(inputs, &corpus.join("sequences"), "sequence", text)
}

fn convert(
    from: &Path,
    to: &Path,
    ending: &str,
    converted: impl Fn(Vec<u8>) -> Option<Vec<u8>>,
) -> io::Result<Converted> {
    fs::create_dir_all(to)?;
    let mut done = Converted::default();
    let files = fs::read_dir(from)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()?;
    for path in files.iter().filter(|path| path.is_file()) {
        let mut target = to.join(path.file_name().unwrap_or_default());
        target.set_extension(ending);
        match converted(fs::read(path)?) {
            _ if target.exists() => done.there += 1,
            Some(content) => {
                fs::write(&target, content)?;
                done.written += 1;
            }
            None => done.passed_over += 1,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mmu_hosted::generate;

    #[test]
    fn what_goes_to_the_inputs_and_back_is_the_same() {
        let folder = std::env::temp_dir().join(format!("mmu-corpus-{}", std::process::id()));
        let (one, inputs, two) = (folder.join("one"), folder.join("inputs"), folder.join("two"));
        fs::create_dir_all(one.join("sequences")).expect("a folder");
        let sequence = generate(7, 4, 40);
        let file = |corpus: &Path, name: &str| corpus.join("sequences").join(name);
        fs::write(file(&one, "good.sequence"), format!("# features 0001:3\n{sequence}")).expect("written");
        fs::write(file(&one, "bad.sequence"), "something else").expect("written");
        let first = to_bytes(&one, &inputs).expect("converted");
        assert_eq!(first, Converted { written: 1, there: 0, passed_over: 1 });
        assert_eq!(to_text(&inputs, &two).expect("converted").written, 1);
        let text = fs::read_to_string(file(&two, "good.sequence")).expect("it is there");
        assert_eq!(Sequence::parse(&text), Ok(sequence));
        assert_eq!(to_text(&inputs, &two).expect("converted"), Converted { there: 1, ..Converted::default() });
        fs::remove_dir_all(&folder).expect("removed");
    }
}
