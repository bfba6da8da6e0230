//! The style that a compiler does not check: ranks, where `unsafe` may live, safety arguments, file sizes, banned calls.
//!
//! The rules are tables at the head of this file; the tests below apply them to every Rust file of the workspace.

use std::fs;
use std::path::{Path, PathBuf};

/// Modules that share a rank and still may not know each other, whatever the direction.
const STRANGERS: [(&str, &str); 1] = [("crypto", "sys")];

/// Where `unsafe` may live: everything Linux, the instruction-set kernels, and the memory keys live in.
const UNSAFE_ALLOWED: [&str; 3] = ["engine/src/sys/", "engine/src/crypto/", "benches/src/libraries.rs"];

/// Crates whose sources forbid `unsafe` altogether, at the head of their roots.
const UNSAFE_FORBIDDEN: [&str; 2] = ["ctl/src/main.rs", "ctl/proto/src/lib.rs"];

/// Lines of code (tests not counted) a file may have.
const LINES_MAX: usize = 700;
/// Lines of code above which a file is listed as worth splitting.
const LINES_SOFT: usize = 500;

/// Larger files, each with the reason why it is one piece.
const LINES_EXEMPT: [(&str, &str); 0] = [];

/// What must not appear in code outside tests: the text, where, and what to do instead.
const BANNED: [(&str, &str, &str); 7] = [
    (".unwrap()", "", "use expect naming the invariant, or an error"),
    ("todo!(", "", "write it"),
    ("unimplemented!(", "", "write it"),
    ("dbg!(", "", "remove it"),
    ("println!(", "engine/src/", "a daemon logs by tracing; its stdout belongs to nobody"),
    ("#[path", "", "let the module tree be the file tree"),
    ("std::mem::transmute", "", "there is always a narrower way"),
];

/// Words the glossary has another for, and promises nobody keeps; comments count. Cut in two, or this file would hold them.
const WORDS: [(&str, &str, &str); 7] = [
    ("master", " key", "volume key"),
    ("key", " slot", "keyslot"),
    ("block", " size of the tweak", "data unit"),
    ("FIX", "ME", "do it, or say in the module head what it refuses to do"),
    ("TO", "DO", "do it, or say in the module head what it refuses to do"),
    ("XX", "X:", "do it, or say in the module head what it refuses to do"),
    ("white", "list", "allowed"),
];

/// Sources, split where their unit tests begin.
struct Source {
    path: String,
    code: String,
    tests: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace").to_owned()
}

/// Every Rust file of the workspace's members.
fn sources() -> Vec<Source> {
    let root = root();
    let mut waiting: Vec<PathBuf> =
        ["engine", "ctl", "benches", "tests"].map(|member| root.join(member)).into();
    let mut found = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                waiting.extend(fs::read_dir(&path).expect("lists").map(|entry| entry.expect("entry").path()));
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("source is UTF-8");
            let name = path.strip_prefix(&root).expect("below the root").to_string_lossy().into_owned();
            let (code, tests) = split_tests(&name, &text);
            found.push(Source { path: name, code: code.to_owned(), tests: tests.to_owned() });
        }
    }
    assert!(found.len() > 10, "the walk found only {} sources", found.len());
    found.sort_by(|one, other| one.path.cmp(&other.path));
    found
}

/// Unit tests stand at the end of their file; files of the test crates are tests as a whole.
fn split_tests<'a>(path: &str, text: &'a str) -> (&'a str, &'a str) {
    let all_test = path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("/tests.rs");
    let at = if all_test { Some(0) } else { text.find("\n#[cfg(test)]\nmod ") };
    text.split_at(at.unwrap_or(text.len()))
}

/// A line without its comment and without the insides of its string literals. Good enough for rustfmt's output: a
/// literal that spans lines keeps its text, which can only report too much.
fn bare(line: &str) -> String {
    let mut kept = String::with_capacity(line.len());
    let mut characters = line.chars().peekable();
    let mut quoted = false;
    while let Some(character) = characters.next() {
        match character {
            '\\' if quoted => {
                characters.next();
            }
            '\'' if !quoted && characters.peek() == Some(&'"') => {
                characters.next();
            }
            '"' => {
                quoted = !quoted;
                kept.push('"');
            }
            '/' if !quoted && characters.peek() == Some(&'/') => break,
            _ if quoted => {}
            _ => kept.push(character),
        }
    }
    kept
}

/// Does `word` stand alone in `line`?
fn has_word(line: &str, word: &str) -> bool {
    let part = |character: char| character.is_alphanumeric() || character == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(part) && !line[at + word.len()..].starts_with(part))
}

/// Fail with every finding at once: fixing a list is quicker than a chain of single failures.
fn conclude(findings: &[String]) {
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

/// Module paths and their ranks.
struct Ranks(Vec<(String, u32)>);

impl Ranks {
    /// From the table at the head of the engine's `lib.rs`, whose lines read "//! | 2 | `backend` `format` `key` |".
    fn read(lib: &str) -> Self {
        let mut entries = vec![("lib".to_owned(), u32::MAX)];
        for line in lib.lines().filter_map(|line| line.strip_prefix("//! |")) {
            let Some((number, modules)) = line.split_once('|') else { continue };
            if let Ok(number) = number.trim().parse::<u32>() {
                let names = modules.split('`').skip(1).step_by(2);
                entries.extend(names.map(|name| (name.to_owned(), number)));
            }
        }
        Self(entries)
    }

    fn of_the_engine() -> Self {
        let ranks = Self::read(&fs::read_to_string(root().join("engine/src/lib.rs")).expect("reads"));
        assert!(ranks.0.len() > 10, "engine/src/lib.rs has no table of ranks any more");
        ranks
    }

    /// The rank of a module path such as `backend::device`, and the entry that gave it: the longest that covers it.
    fn of(&self, module: &str) -> Option<(&str, u32)> {
        let covers = |entry: &str| module == entry || module.starts_with(&format!("{entry}::"));
        let found = self.0.iter().filter(|(entry, _)| covers(entry)).max_by_key(|(entry, _)| entry.len());
        found.map(|(entry, rank)| (entry.as_str(), *rank))
    }
}

/// `engine/src/backend/uring.rs` is module `backend::uring`.
fn module_of(path: &str) -> Option<String> {
    let path = path.strip_prefix("engine/src/")?.strip_suffix(".rs")?;
    Some(path.strip_suffix("/mod").unwrap_or(path).replace('/', "::"))
}

/// Module paths a source reaches by `crate::`, with line numbers: `crate::{a, b::c}` names both.
fn reached(code: &str) -> Vec<(usize, String)> {
    let text: String = code.lines().map(|line| bare(line) + "\n").collect();
    let path_end = |rest: &str| {
        rest.find(|character: char| !(character.is_alphanumeric() || "_:".contains(character)))
            .unwrap_or(rest.len())
    };
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        if text[..at].ends_with(|character: char| character.is_alphanumeric() || "_$".contains(character)) {
            continue;
        }
        let line = text[..at].lines().count().max(1);
        let rest = &text[at + "crate::".len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push((line, rest[..path_end(rest)].trim_end_matches(':').to_owned()));
            continue;
        };
        // The heads of a group's items: what follows its brace or a comma of the outermost level.
        let (mut depth, mut head) = (0, true);
        for (place, character) in group.char_indices() {
            match character {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => head = true,
                _ if head && depth == 0 && character.is_alphabetic() => {
                    head = false;
                    let item = &group[place..];
                    found.push((line, item[..path_end(item)].trim_end_matches(':').to_owned()));
                }
                _ => {}
            }
        }
    }
    found
}

/// One line per import that does not go down.
fn rank_findings(ranks: &Ranks, path: &str, module: &str, code: &str) -> Vec<String> {
    let Some((own, own_rank)) = ranks.of(module) else {
        return vec![format!("{path}: module {module} has no rank in the table of engine/src/lib.rs")];
    };
    let mut findings = Vec::new();
    for (line, target) in reached(code) {
        let Some((other, other_rank)) = ranks.of(&target) else {
            continue; // an item of lib.rs itself
        };
        let strange = STRANGERS.iter().any(|&pair| pair == (own, other) || pair == (other, own));
        if other != own && (other_rank >= own_rank || strange) && !(own_rank == 0 && other_rank == 0) {
            findings
                .push(format!("{path}:{line}: {own} (rank {own_rank}) reaches {other} (rank {other_rank})"));
        }
    }
    findings
}

#[test]
fn imports_go_down_the_ranks() {
    let (sources, ranks) = (sources(), Ranks::of_the_engine());
    let engine = sources.iter().filter_map(|source| Some((source, module_of(&source.path)?)));
    let findings: Vec<String> = engine
        .flat_map(|(source, module)| rank_findings(&ranks, &source.path, &module, &source.code))
        .collect();
    conclude(&findings);
}

#[test]
fn an_import_that_climbs_is_found() {
    let table = "//! | 0 | `units` `error` |\n//! | 1 | `sys` `crypto` |\n//! | 3 | `pipeline` |\n//! | 4 | `job` |\n";
    let ranks = Ranks::read(table);
    let climbing = "use crate::units::Extent;\nuse crate::{error::Error, job::{Registry, Owner}};\n";
    let findings = rank_findings(&ranks, "x.rs", "pipeline::slot", climbing);
    assert_eq!(findings, ["x.rs:2: pipeline (rank 3) reaches job (rank 4)"]);
    assert_eq!(rank_findings(&ranks, "x.rs", "job", climbing), Vec::<String>::new());
    assert_eq!(rank_findings(&ranks, "x.rs", "sys::lock", "let x = crate::crypto::Kernel::AesNi;").len(), 1);
    assert_eq!(
        rank_findings(&ranks, "x.rs", "pipeline", "// see crate::job\nlet x = \"crate::job\";").len(),
        0
    );
    assert_eq!(rank_findings(&ranks, "x.rs", "unknown", "").len(), 1);
}

#[test]
fn unsafe_lives_where_it_may_and_argues() {
    let mut findings = Vec::new();
    for Source { path, code, tests } in &sources() {
        let allowed = UNSAFE_ALLOWED.iter().any(|place| path.starts_with(place));
        let head_allows = code.contains("#![allow(unsafe_code)]") || code.contains("#![allow(unsafe_code,");
        if head_allows && !allowed {
            findings.push(format!("{path}: allows unsafe_code outside {UNSAFE_ALLOWED:?}"));
        }
        let text = code.clone() + tests;
        for line in unsafe_sites(&text) {
            if !allowed {
                findings.push(format!("{path}:{line}: unsafe outside {UNSAFE_ALLOWED:?}"));
            } else if !is_argued(&text, line) {
                findings.push(format!("{path}:{line}: no SAFETY comment"));
            }
        }
    }
    for path in UNSAFE_FORBIDDEN {
        let text = fs::read_to_string(root().join(path)).expect("reads");
        if !text.contains("#![forbid(unsafe_code)]") {
            findings.push(format!("{path}: does not forbid unsafe_code"));
        }
    }
    conclude(&findings);
}

/// Line numbers, from 1, of `unsafe` as a keyword; not of lint names, and not of attributes such as `#[unsafe(naked)]`.
fn unsafe_sites(text: &str) -> Vec<usize> {
    let site = |line: &str| has_word(line, "unsafe") && !line.trim_start().starts_with('#');
    text.lines().enumerate().filter(|(_, line)| site(&bare(line))).map(|(index, _)| index + 1).collect()
}

/// A block or impl has `SAFETY:` in the comment above it. The comment may stand above the
/// whole statement, and one comment may argue for a run of neighbouring lines without a blank line between.
fn is_argued(text: &str, line: usize) -> bool {
    let lines: Vec<&str> = text.lines().collect();
    let own = lines[line - 1];
    let says = |line: &str| line.contains("SAFETY");
    // A function only asks something of its callers; clippy sees to it that a public one says what.
    let declares = ["unsafe fn", "unsafe extern"].iter().any(|head| bare(own).contains(head));
    if says(own) || declares {
        return true;
    }
    lines[..line - 1].iter().rev().take(40).take_while(|line| !line.trim().is_empty()).any(|line| says(line))
}

#[test]
fn an_unargued_unsafe_is_found() {
    let text = "fn f() {\n    // SAFETY: fine\n    unsafe { g() }\n\n    unsafe { h() }\n}\n// unsafe\nlet s = \"unsafe\";\n";
    let sites = unsafe_sites(text);
    assert_eq!(sites, [3, 5]);
    assert_eq!(sites.iter().map(|&line| is_argued(text, line)).collect::<Vec<_>>(), [true, false]);
    assert_eq!(unsafe_sites("#![allow(unsafe_code)]\n#[unsafe(naked)]\n"), Vec::<usize>::new());
}

#[test]
fn files_stay_small() {
    let mut findings = Vec::new();
    for Source { path, code, tests } in &sources() {
        let text = if code.is_empty() { tests } else { code };
        let count = text.lines().filter(|line| !bare(line).trim().is_empty()).count();
        let exempt = LINES_EXEMPT.iter().any(|(exempt, _)| exempt == path);
        if count > LINES_MAX && !exempt {
            findings.push(format!(
                "{path}: {count} lines of code, more than {LINES_MAX}: split it by reason to change"
            ));
        } else if count > LINES_SOFT {
            println!("{path}: {count} lines of code, more than {LINES_SOFT}");
        }
    }
    conclude(&findings);
}

#[test]
fn banned_calls_stay_out() {
    let mut findings = Vec::new();
    for Source { path, code, .. } in &sources() {
        for (index, line) in code.lines().enumerate() {
            let line = bare(line);
            for (banned, place, instead) in BANNED {
                // `eprintln!` holds `println!`, but on the daemon's stderr before it logs it is in its place.
                let present = line
                    .match_indices(banned)
                    .any(|(at, _)| !line[..at].ends_with('e') || banned != "println!(");
                if present && path.starts_with(place) {
                    findings.push(format!("{path}:{}: {banned} … {instead}", index + 1));
                }
            }
        }
    }
    conclude(&findings);
}

#[test]
fn one_word_has_one_meaning() {
    let mut findings = Vec::new();
    for Source { path, code, tests } in &sources() {
        for (index, line) in (code.clone() + tests).lines().enumerate() {
            for (head, tail, instead) in WORDS {
                if has_word(line, &format!("{head}{tail}")) {
                    findings.push(format!("{path}:{}: {head}{tail}: {instead}", index + 1));
                }
            }
        }
    }
    conclude(&findings);
}

#[test]
fn every_module_says_what_it_is_for() {
    let headless = |source: &&Source| {
        let text = source.code.clone() + &source.tests;
        !text.lines().find(|line| !line.starts_with("#![")).is_some_and(|line| line.starts_with("//! "))
    };
    let findings: Vec<String> = sources()
        .iter()
        .filter(headless)
        .map(|source| format!("{}: does not begin with a //! line", source.path))
        .collect();
    conclude(&findings);
}

#[test]
fn scripts_are_strict_and_executable() {
    use std::os::unix::fs::PermissionsExt;
    let mut findings = Vec::new();
    let scripts = fs::read_dir(root().join("tools")).expect("lists tools");
    for path in scripts.map(|entry| entry.expect("entry").path()).filter(|path| path.is_file()) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if text.starts_with("#!") {
            let mode = fs::metadata(&path).expect("metadata").permissions().mode();
            let strict = text.contains("set -euo pipefail") || !text.starts_with("#!/usr/bin/env bash");
            if mode & 0o111 == 0 || !strict {
                findings
                    .push(format!("{}: not executable, or bash without set -euo pipefail", path.display()));
            }
        }
    }
    conclude(&findings);
}
