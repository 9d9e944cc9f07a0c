// The registers of D, for inline assembly: their names in the instruction and their operands. Each N has those of N - 8
// and four more. Macros, because a string of operand names cannot be computed otherwise.
#pragma once

// clang-format off
#define MOE_WGMMA_NAMES_8 "%0,%1,%2,%3"
#define MOE_WGMMA_NAMES_16 MOE_WGMMA_NAMES_8 ",%4,%5,%6,%7"
#define MOE_WGMMA_NAMES_24 MOE_WGMMA_NAMES_16 ",%8,%9,%10,%11"
#define MOE_WGMMA_NAMES_32 MOE_WGMMA_NAMES_24 ",%12,%13,%14,%15"
#define MOE_WGMMA_NAMES_40 MOE_WGMMA_NAMES_32 ",%16,%17,%18,%19"
#define MOE_WGMMA_NAMES_48 MOE_WGMMA_NAMES_40 ",%20,%21,%22,%23"
#define MOE_WGMMA_NAMES_56 MOE_WGMMA_NAMES_48 ",%24,%25,%26,%27"
#define MOE_WGMMA_NAMES_64 MOE_WGMMA_NAMES_56 ",%28,%29,%30,%31"
#define MOE_WGMMA_NAMES_72 MOE_WGMMA_NAMES_64 ",%32,%33,%34,%35"
#define MOE_WGMMA_NAMES_80 MOE_WGMMA_NAMES_72 ",%36,%37,%38,%39"
#define MOE_WGMMA_NAMES_88 MOE_WGMMA_NAMES_80 ",%40,%41,%42,%43"
#define MOE_WGMMA_NAMES_96 MOE_WGMMA_NAMES_88 ",%44,%45,%46,%47"
#define MOE_WGMMA_NAMES_104 MOE_WGMMA_NAMES_96 ",%48,%49,%50,%51"
#define MOE_WGMMA_NAMES_112 MOE_WGMMA_NAMES_104 ",%52,%53,%54,%55"
#define MOE_WGMMA_NAMES_120 MOE_WGMMA_NAMES_112 ",%56,%57,%58,%59"
#define MOE_WGMMA_NAMES_128 MOE_WGMMA_NAMES_120 ",%60,%61,%62,%63"
#define MOE_WGMMA_NAMES_136 MOE_WGMMA_NAMES_128 ",%64,%65,%66,%67"
#define MOE_WGMMA_NAMES_144 MOE_WGMMA_NAMES_136 ",%68,%69,%70,%71"
#define MOE_WGMMA_NAMES_152 MOE_WGMMA_NAMES_144 ",%72,%73,%74,%75"
#define MOE_WGMMA_NAMES_160 MOE_WGMMA_NAMES_152 ",%76,%77,%78,%79"
#define MOE_WGMMA_NAMES_168 MOE_WGMMA_NAMES_160 ",%80,%81,%82,%83"
#define MOE_WGMMA_NAMES_176 MOE_WGMMA_NAMES_168 ",%84,%85,%86,%87"
#define MOE_WGMMA_NAMES_184 MOE_WGMMA_NAMES_176 ",%88,%89,%90,%91"
#define MOE_WGMMA_NAMES_192 MOE_WGMMA_NAMES_184 ",%92,%93,%94,%95"
#define MOE_WGMMA_NAMES_200 MOE_WGMMA_NAMES_192 ",%96,%97,%98,%99"
#define MOE_WGMMA_NAMES_208 MOE_WGMMA_NAMES_200 ",%100,%101,%102,%103"
#define MOE_WGMMA_NAMES_216 MOE_WGMMA_NAMES_208 ",%104,%105,%106,%107"
#define MOE_WGMMA_NAMES_224 MOE_WGMMA_NAMES_216 ",%108,%109,%110,%111"
#define MOE_WGMMA_NAMES_232 MOE_WGMMA_NAMES_224 ",%112,%113,%114,%115"
#define MOE_WGMMA_NAMES_240 MOE_WGMMA_NAMES_232 ",%116,%117,%118,%119"
#define MOE_WGMMA_NAMES_248 MOE_WGMMA_NAMES_240 ",%120,%121,%122,%123"
#define MOE_WGMMA_NAMES_256 MOE_WGMMA_NAMES_248 ",%124,%125,%126,%127"
#define MOE_WGMMA_OPERANDS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define MOE_WGMMA_OPERANDS_16 MOE_WGMMA_OPERANDS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define MOE_WGMMA_OPERANDS_24 MOE_WGMMA_OPERANDS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define MOE_WGMMA_OPERANDS_32 MOE_WGMMA_OPERANDS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MOE_WGMMA_OPERANDS_40 MOE_WGMMA_OPERANDS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define MOE_WGMMA_OPERANDS_48 MOE_WGMMA_OPERANDS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define MOE_WGMMA_OPERANDS_56 MOE_WGMMA_OPERANDS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define MOE_WGMMA_OPERANDS_64 MOE_WGMMA_OPERANDS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MOE_WGMMA_OPERANDS_72 MOE_WGMMA_OPERANDS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define MOE_WGMMA_OPERANDS_80 MOE_WGMMA_OPERANDS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define MOE_WGMMA_OPERANDS_88 MOE_WGMMA_OPERANDS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define MOE_WGMMA_OPERANDS_96 MOE_WGMMA_OPERANDS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define MOE_WGMMA_OPERANDS_104 MOE_WGMMA_OPERANDS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define MOE_WGMMA_OPERANDS_112 MOE_WGMMA_OPERANDS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define MOE_WGMMA_OPERANDS_120 MOE_WGMMA_OPERANDS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define MOE_WGMMA_OPERANDS_128 MOE_WGMMA_OPERANDS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MOE_WGMMA_OPERANDS_136 MOE_WGMMA_OPERANDS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define MOE_WGMMA_OPERANDS_144 MOE_WGMMA_OPERANDS_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define MOE_WGMMA_OPERANDS_152 MOE_WGMMA_OPERANDS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define MOE_WGMMA_OPERANDS_160 MOE_WGMMA_OPERANDS_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define MOE_WGMMA_OPERANDS_168 MOE_WGMMA_OPERANDS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define MOE_WGMMA_OPERANDS_176 MOE_WGMMA_OPERANDS_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define MOE_WGMMA_OPERANDS_184 MOE_WGMMA_OPERANDS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define MOE_WGMMA_OPERANDS_192 MOE_WGMMA_OPERANDS_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define MOE_WGMMA_OPERANDS_200 MOE_WGMMA_OPERANDS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define MOE_WGMMA_OPERANDS_208 MOE_WGMMA_OPERANDS_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define MOE_WGMMA_OPERANDS_216 MOE_WGMMA_OPERANDS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define MOE_WGMMA_OPERANDS_224 MOE_WGMMA_OPERANDS_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define MOE_WGMMA_OPERANDS_232 MOE_WGMMA_OPERANDS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define MOE_WGMMA_OPERANDS_240 MOE_WGMMA_OPERANDS_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define MOE_WGMMA_OPERANDS_248 MOE_WGMMA_OPERANDS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define MOE_WGMMA_OPERANDS_256 MOE_WGMMA_OPERANDS_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// clang-format on
