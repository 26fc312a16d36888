" Neovim itself, the same story as story.py in its own words: it has signed 64-bit integers,
" strings that are bytes, and one request under way at a time, so its hundred calls are notifications.

let s:MIB = 1048576
let s:VALUES = [
  \ 'green', 'grün', repeat('x', 31), repeat('x', 32), repeat('x', 256), repeat('x', 65536), '', repeat('x', s:MIB),
  \ "\xff", repeat("\xff", s:MIB),
  \ 0, 1, -1, 127, 128, -32, -33, 65536, 0x7fffffffffffffff, -0x7fffffffffffffff,
  \ 0.0, 1.5, -0.1, 1.0e300,
  \ v:true, v:false,
  \ [], [1, v:null, [2.5, 'grün', "\xff"]], range(1000),
  \ {}, {'leaves': [1, 2], 'old': v:null, 'inner': {'a': "\xff"}},
  \ ]

function s:Connect(port)
  return sockconnect('tcp', '127.0.0.1:' . a:port, {'rpc': v:true})
endfunction

function s:Story(kv, name)
  for value in s:VALUES
    call s:Same(v:null, rpcrequest(a:kv, 'set', 'tea', value), value)
    call s:Same(value, rpcrequest(a:kv, 'get', 'tea'), value)
  endfor
  call rpcrequest(a:kv, 'set', 'tea', 0zff00)
  " A blob comes back as a string, which Vim script ends at the 0 byte and Lua does not.
  call s:Same(2, luaeval('#vim.rpcrequest(_A, "get", "tea")', a:kv), 'the length of a blob')
  call s:Same(v:null, rpcrequest(a:kv, 'delete', 'tea'), 'delete')
  call s:Same(v:null, rpcrequest(a:kv, 'get', 'tea'), 'a deleted key')
  call s:Same(v:null, rpcrequest(a:kv, 'get', 'never set'), 'a missing key')
  call rpcrequest(a:kv, 'set', 'tea', 'green')
  call rpcrequest(a:kv, 'set', 'tea', v:null)
  call s:Same(v:null, rpcrequest(a:kv, 'get', 'tea'), 'nil')

  call assert_fails("call rpcrequest(" . a:kv . ", 'steep', 'tea')", 'no-such-method: ')
  call assert_fails("call rpcrequest(" . a:kv . ", 'get')", 'bad-request: ')
  call assert_fails("call rpcrequest(" . a:kv . ", 'set', 'tea', repeat('x', " . (s:MIB + 1) . "))", 'too-large: ')

  for n in range(100)
    call rpcnotify(a:kv, 'set', a:name . ' ' . n, n)
  endfor
  call s:FindsAll(a:kv, a:name)

  call rpcrequest(a:kv, 'set', 'text of ' . a:name, 'grün of ' . a:name)
  call rpcrequest(a:kv, 'set', "\xff of " . a:name, s:Bytes(a:name))
endfunction

function s:GoesOn(kv, name)
  call s:Finds(a:kv, a:name)
  call s:FindsAll(a:kv, a:name)
  call rpcrequest(a:kv, 'set', 'tea', 'black')
  call s:Same('black', rpcrequest(a:kv, 'get', 'tea'), 'a set after a node was killed')
endfunction

" A notification has no answer that tells when it has been carried out.
function s:FindsAll(kv, name)
  for n in range(100)
    call s:Same(0, wait(20000, {-> rpcrequest(a:kv, 'get', a:name . ' ' . n) is n}), n)
  endfor
endfunction

function s:Finds(kv, name)
  for key in ['text of ' . a:name, s:Blob('text of ' . a:name)]
    call s:Same('grün of ' . a:name, rpcrequest(a:kv, 'get', key), key)
  endfor
  call s:Same(s:Bytes(a:name), rpcrequest(a:kv, 'get', "\xff of " . a:name), 'bytes of ' . a:name)
endfunction

function s:Bytes(name)
  return "\xff\xfe of " . a:name
endfunction

function s:Blob(text)
  return eval('0z' . join(map(range(len(a:text)), {_, at -> printf('%02x', char2nr(a:text[at]))}), ''))
endfunction

function s:Same(wanted, got, what)
  if type(a:got) != type(a:wanted) || a:got != a:wanted
    throw string(a:what)[:200] . ': ' . string(a:got)[:200] . ' came, ' . string(a:wanted)[:200] . ' was wanted'
  endif
endfunction

try
  let [s:what, s:port; s:rest] = argv()
  let s:kv = s:Connect(s:port)
  if s:what == 'story'
    let [s:other_port, s:pid, s:name] = s:rest
    call s:Story(s:kv, s:name)
    call system('kill -9 ' . s:pid)
    call assert_fails("call rpcrequest(" . s:kv . ", 'get', 'tea')")
    call s:GoesOn(s:Connect(s:other_port), s:name)
  else
    for s:name in s:rest
      call s:Finds(s:kv, s:name)
    endfor
  endif
catch
  call add(v:errors, v:throwpoint . ': ' . v:exception)
endtry
call writefile(v:errors, '/dev/stderr')
execute empty(v:errors) ? 'qall!' : 'cquit!'
