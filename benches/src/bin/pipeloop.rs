//! The ends and the limit of the pipe case: `produce BYTES`, `copy`, `consume`, `digest`.
//!
//! `copy` is the plain 1 MiB read/write loop that a filter is measured against. Producer and consumer are the same for
//! every contender, so what differs between two runs is only what stands between them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use benches::source::{BLOCK, Pattern, REPEAT, digest_stream};
use rustix::pipe::fcntl_setpipe_size;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["produce", bytes] => bytes.parse().map_err(io::Error::other).and_then(produce),
        ["copy"] => copy(),
        ["consume"] => consume(),
        ["digest"] => digest(),
        _ => Err(io::Error::other("usage: pipeloop produce BYTES | copy | consume | digest")),
    };
    outcome.map_or_else(
        |error| {
            eprintln!("pipeloop: {error}");
            ExitCode::FAILURE
        },
        |()| ExitCode::SUCCESS,
    )
}

/// An end as a plain file, because `std`'s own handles buffer; widened to 1 MiB if it is a pipe that may grow.
fn end(of: impl AsFd) -> io::Result<File> {
    let file = File::from(of.as_fd().try_clone_to_owned()?);
    let _ = fcntl_setpipe_size(&file, BLOCK);
    Ok(file)
}

fn produce(mut left: u64) -> io::Result<()> {
    let mut stdout = end(io::stdout())?;
    let mut bytes = vec![0; REPEAT];
    Pattern.fill(0, &mut bytes);
    let mut blocks = bytes.chunks_exact(BLOCK).cycle();
    while left > 0 {
        let block = blocks.next().expect("a cycle of blocks has no end");
        let length = usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK));
        stdout.write_all(&block[..length])?;
        left -= length as u64;
    }
    Ok(())
}

fn copy() -> io::Result<()> {
    let (mut stdin, mut stdout) = (end(io::stdin())?, end(io::stdout())?);
    let mut block = vec![0; BLOCK];
    loop {
        let length = stdin.read(&mut block)?;
        if length == 0 {
            return Ok(());
        }
        stdout.write_all(&block[..length])?;
    }
}

fn consume() -> io::Result<()> {
    let mut stdin = end(io::stdin())?;
    let mut block = vec![0; BLOCK];
    let mut total = 0;
    loop {
        let length = stdin.read(&mut block)?;
        if length == 0 {
            println!("{total}");
            return Ok(());
        }
        total += length as u64;
    }
}

fn digest() -> io::Result<()> {
    let mut stdin = end(io::stdin())?;
    let (total, digest) = digest_stream(&mut stdin)?;
    println!("{total} {digest}");
    Ok(())
}
